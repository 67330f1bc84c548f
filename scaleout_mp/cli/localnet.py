"""`scaleout-mp localnet`."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from scaleout_mp.cli.extras import require_extra
from scaleout_mp.cli.models import open_seed
from scaleout_mp.cli.options import configure_logging, debug_option

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from scaleout_mp.localnet import FaultOrder, SessionPlan, SessionResult

_PORT = click.IntRange(0, 65535)
_SECONDS = click.FloatRange(min=0, min_open=True)
_COUNT = click.IntRange(min=1)


@click.command(short_help="Start a local Scaleout Edge network.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("scaleout-localnet"),
    show_default=True,
    help="Where models and results are kept.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--api-port", type=_PORT, default=8092, show_default=True, help="Port of the REST API; 0: any.")
@click.option("--combiner-port", type=_PORT, default=12080, show_default=True, help="Port of the combiner; 0: any.")
@click.option("--token", help="What clients must give as their token.  [default: every client may join]")
@click.option("--auth", is_flag=True, help="Clients need a token; one of each kind is made and shown.")
@click.option(
    "--token-lifetime",
    type=_SECONDS,
    default=3600.0,
    show_default=True,
    help="Seconds that an access token is good for.",
)
@click.option("--tls", is_flag=True, help="Speak TLS, with certificates made in the folder.")
@click.option("--client-certs", is_flag=True, help="Speak TLS, and let in who shows a certificate; one is made.")
@click.option("--delay", type=_SECONDS, help="Hold up every call of the combiner and the API by so many seconds.")
@click.option("--loss", type=click.FloatRange(0, 100), help="Let so many percent of the combiner's calls fail.")
@click.option("--fault", "faults", multiple=True, help='Let calls fail: "Download:truncate=1000,times=3". Repeatable.')
@click.option(
    "--restart-every", type=_SECONDS, help="Take the combiner away for a while, so many seconds after it came."
)
@click.option(
    "--down", type=_SECONDS, default=3.0, show_default=True, help="Seconds that --restart-every takes it away."
)
@click.option("--rounds", type=_COUNT, help="Run a session of so many rounds, then end.")
@click.option(
    "--seed",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Model that the session starts from: a model file (.scm), or weights as written by numpy.savez (.npz).",
)
@click.option(
    "--release", type=click.Choice(["1.0", "1.1"]), default="1.1", show_default=True, help="What the combiner speaks."
)
@click.option("--min-clients", type=_COUNT, default=1, show_default=True, help="Clients that a round waits for.")
@click.option("--min-updates", type=_COUNT, default=1, show_default=True, help="Updates that a new model needs.")
@click.option("--round-timeout", type=_SECONDS, default=300.0, show_default=True, help="Seconds to train in a round.")
@debug_option
@click.pass_context
def localnet(ctx: click.Context, /, **given: Any) -> int:
    """Start a local Scaleout Edge network: REST API, combiner and, with --rounds, a session.

    Clients of any version can join it. There is a line for each event. Ctrl-C ends it; without --rounds it
    runs until then.

    \b
    Examples:
      scaleout-mp localnet
      scaleout-mp localnet --seed seed.npz --rounds 5 --min-clients 2 --min-updates 2
      scaleout-mp localnet --folder ./network --token secret --api-port 0
      scaleout-mp localnet --auth --tls --loss 20 --fault "Upload:refuse,share=0.5"
    """  # noqa: D301 - click reads the \b
    require_extra("localnet")
    if (given["rounds"] is None) != (given["seed"] is None):
        raise click.UsageError("--rounds and --seed go together: a session needs both")
    configure_logging(ctx)
    session = _session(given)
    return asyncio.run(_until_signal(_network(given, session), session))


def _session(given: Mapping[str, Any]) -> SessionPlan | None:
    from scaleout_mp.localnet import SessionPlan

    if given["rounds"] is None:
        return None
    return SessionPlan(**{name: given[name] for name in ("rounds", "min_clients", "min_updates", "round_timeout")})


def _network(given: Mapping[str, Any], session: SessionPlan | None) -> Coroutine[None, None, SessionResult | None]:
    """Return the network, which runs once it is awaited."""
    from scaleout_mp.localnet import Tls, serve

    every = given["restart_every"]
    return serve(
        given["folder"],
        on_line=click.echo,
        host=given["host"],
        api_port=given["api_port"],
        combiner_port=given["combiner_port"],
        token=given["token"],
        auth=given["auth"],
        token_lifetime=given["token_lifetime"],
        tls=Tls.MUTUAL if given["client_certs"] else Tls.ON if given["tls"] else Tls.OFF,
        faults=_faults(given["faults"], delay=given["delay"], loss=given["loss"]),
        restart=None if every is None else (every, given["down"]),
        release=given["release"],
        session=session,
        seed=None if given["seed"] is None else open_seed(given["seed"]),
    )


def _faults(texts: tuple[str, ...], *, delay: float | None, loss: float | None) -> list[FaultOrder]:
    import grpc

    from scaleout_mp.localnet import Fault, FaultOrder, read_fault

    orders = [read_fault(text) for text in texts]
    if delay is not None:
        orders.append(FaultOrder(methods="*", fault=Fault(delay=delay)))
    if loss is not None:
        # The REST API's calls are lower-case: who cannot connect sees no more faults.
        lost = Fault(code=grpc.StatusCode.UNAVAILABLE, details="lost, as ordered by --loss")
        orders.append(FaultOrder(methods="[A-Z]*", fault=lost, share=loss / 100))
    return orders


async def _until_signal(work: Coroutine[None, None, SessionResult | None], session: SessionPlan | None) -> int:
    """Await the network's end; Ctrl-C and SIGTERM are one."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        result = await task
    except asyncio.CancelledError:
        click.echo("local network stopped")
        return 0
    if session is None or result is None:
        return 0
    click.echo(f"the session's last model is {result.model_id}")
    return 0 if result.finished else 1
