"""Which of the program's environment variables a task gets to see.

An allow list: secrets have any name. What is on it, and why: what finds programs, libraries and interpreters; language
and time zone; how numerical libraries are to compute, and on which devices; where caches and certificates are. Of a
family, such as `TORCH_*`, nothing goes through whose name speaks of a secret: `HF_HOME` does, `HF_TOKEN` does not.
"""

from __future__ import annotations

import fnmatch
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_NAMES: Final = frozenset(
    {
        # Who and where.
        "HOME",
        "HOSTNAME",
        "LOGNAME",
        "PATH",
        "SHELL",
        "TERM",
        "USER",
        # Language, time, terminal.
        "COLORTERM",
        "COLUMNS",
        "FORCE_COLOR",
        "LANG",
        "LANGUAGE",
        "LINES",
        "NO_COLOR",
        "TZ",
        "TZDIR",
        # The interpreter and its libraries.
        "CONDA_DEFAULT_ENV",
        "CONDA_PREFIX",
        "GLIBC_TUNABLES",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "VIRTUAL_ENV",
        # Certificates and proxies; see `_without_password`.
        "ALL_PROXY",
        "CURL_CA_BUNDLE",
        "FTP_PROXY",
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "NO_PROXY",
        "REQUESTS_CA_BUNDLE",
        "SSL_CERT_DIR",
        "SSL_CERT_FILE",
        "all_proxy",
        "ftp_proxy",
        "http_proxy",
        "https_proxy",
        "no_proxy",
        # Data and caches.
        "MPLBACKEND",
        "MPLCONFIGDIR",
        "NLTK_DATA",
        "SCIKIT_LEARN_DATA",
        "TOKENIZERS_PARALLELISM",
        "TRANSFORMERS_CACHE",
        "TRANSFORMERS_OFFLINE",
    }
)

_FAMILIES: Final = (
    "ARROW_",
    "BLIS_",
    "CUBLAS_",
    "CUDA_",
    "CUDNN_",
    "DNNL_",
    "GOMP_",
    "GOTO_",
    "GPU_",
    "HF_",
    "HIP_",
    "HSA_",
    "JAX_",
    "JOBLIB_",
    "KERAS_",
    "KMP_",
    "LC_",
    "LOKY_",
    "MALLOC_",
    "MIOPEN_",
    "MKL_",
    "NCCL_",
    "NUMBA_",
    "NUMEXPR_",
    "NVIDIA_",
    "NPY_",
    "OMP_",
    "ONEDNN_",
    "OPENBLAS_",
    "POLARS_",
    "PYTHON",
    "PYTORCH_",
    "RAYON_",
    "ROCM_",
    "ROCR_",
    "SKLEARN_",
    "TBB_",
    "TF_CPP_",
    "TF_DETERMINISTIC_",
    "TF_ENABLE_",
    "TF_FORCE_",
    "TF_GPU_",
    "TF_NUM_",
    "TF_USE_",
    "TF_XLA_",
    "TORCH_",
    "TRITON_",
    "VECLIB_",
    "XDG_",
    "XLA_",
    "ZE_",
)

#: Of the family PYTHON, what is for a person at a terminal.
_INTERACTIVE: Final = frozenset({"PYTHONINSPECT", "PYTHONSTARTUP", "PYTHONBREAKPOINT"})

_SECRET: Final = re.compile(r"AUTH|COOKIE|CREDENTIAL|KEY|PASS|PWD|SECRET|SESSION|TOKEN", re.IGNORECASE)
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
#: The client's own: these hold the tokens of the network.
_OURS: Final = ("FEDN_", "SCALEOUT_")


def scrub(environ: Mapping[str, str], passed: Iterable[str] = ()) -> dict[str, str]:
    """Return what tasks get of `environ`: the allow list, and what the user says by name or by a pattern with "*".

    A name goes through as it is. A pattern leaves out the variables of the client itself, which hold its tokens.
    """
    wanted = list(passed)
    names = {name for name in wanted if "*" not in name}
    patterns = [name for name in wanted if "*" in name]
    kept = {}
    for name, value in environ.items():
        if name in names or (not name.startswith(_OURS) and any(fnmatch.fnmatchcase(name, one) for one in patterns)):
            kept[name] = value
        elif _is_allowed(name):
            kept[name] = _without_password(value) if name.lower().endswith("_proxy") else value
    return kept


def _is_allowed(name: str) -> bool:
    if name in _NAMES:
        return True
    return name.startswith(_FAMILIES) and name not in _INTERACTIVE and _SECRET.search(name) is None


def _without_password(proxy: str) -> str:
    """Return a proxy's address without what stands before its last "@"; other values as they are."""
    if "@" not in proxy:
        return proxy
    scheme = _SCHEME.match(proxy)
    return (scheme.group() if scheme else "") + proxy.rpartition("@")[2]
