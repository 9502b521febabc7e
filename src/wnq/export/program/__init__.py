"""Programs of ``torch.export`` with integer layers: what the dialects ``torch`` and ``executorch`` write."""
