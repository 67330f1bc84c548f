"""Training with PyTorch and DataLoader workers, for a task process."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, TensorDataset


def train_with_workers():
    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    targets = inputs.sum(dim=1, keepdim=True)
    model = torch.nn.Linear(8, 1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = None
    for _ in range(3):
        for batch, wanted in DataLoader(TensorDataset(inputs, targets), batch_size=32, num_workers=2):
            optimiser.zero_grad()
            loss = torch.nn.functional.mse_loss(model(batch), wanted)
            loss.backward()
            optimiser.step()
    return float(loss)
