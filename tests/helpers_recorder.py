"""What ``test_recorder.py`` records, also in processes of their own; they import no more than they need."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import wnq
from wnq.plan import make_plan
from wnq.recorder import TailRecorder


def small(seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    method = wnq.get_method("wnq", w_bits=3, a_bits=32, **options)
    return wnq.quantize_(model, make_plan(model, method, first_last_bits=None))


def backward(model, seed=0, share=slice(None)):
    """Leave the gradient of a batch of 16, or of a share of it."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)
    nn.functional.cross_entropy(model(x[share]), y[share]).backward()


def record_in_a_process(rank, folder):
    """One of two processes that train together: leave in a file what it records, and how sharded weights are refused."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    network = nn.parallel.DistributedDataParallel(small())
    recorder = TailRecorder(network, every=1, path=folder / "tails.jsonl")
    recorder.resume_after(0)
    backward(network, share=slice(8 * rank, 8 * rank + 8))
    records = recorder.after_backward(1)
    refusal = ""
    try:
        TailRecorder(fully_shard(small(), mesh=dist.device_mesh.init_device_mesh("cpu", (2,))))
    except ValueError as error:
        refusal = str(error)
    torch.save([[vars(record) for record in records], refusal], folder / f"rank{rank}.pt")
    dist.destroy_process_group()
