"""The custom operators on DTensors: two processes against one, in every split, forward and backward."""

from __future__ import annotations

import socket

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)

import torch.multiprocessing  # noqa: E402

import structmat as sm  # noqa: E402
from structmat.backends.base import ChainLayout  # noqa: E402
from structmat.backends.torch import chain_op, kron_op, layout  # noqa: E402, F401 (define the operators)


def operands(operator, columns):
    """Operand, bias, factors and the rest of the arguments of ``structmat::chain``."""
    walk = layout.layout_of(ChainLayout(operator.patterns, *operator.shape, operator.out_order, operator.in_order))
    factors = [torch.from_numpy(f).reshape(s) for f, s in zip(operator.factors, walk.shapes, strict=True)]
    x = torch.randn((operator.shape[1], 4) if columns else (4, operator.shape[1]), dtype=torch.float64)
    return [x, torch.randn(operator.shape[0], dtype=torch.float64), *factors], (list(walk.code), columns)


def cases():
    """Name, operator of torch, tensors, other arguments, placements of the tensors and of the expected result."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole, chain = Replicate(), torch.ops.structmat.chain
    for columns in (False, True):
        samples, features = Shard(1 if columns else 0), Shard(0 if columns else 1)
        btt = sm.BlockTensorTrain.random((12, 8), blocks=(2, 4), rng=0)
        rank2 = sm.BlockTensorTrain.random((12, 8), blocks=2, rank=2, rng=0)
        monarch = sm.Monarch.random((12, 8), blocks=2, rank=2, rng=0)
        butterfly = sm.Butterfly.random((8, 8), rng=0)
        column, row = [whole, Shard(0), Shard(0), Shard(1)], [features, whole, Shard(2), Shard(0)]
        for name, operator, places, out in (
            ("batch", btt, [samples, whole, whole, whole], samples),
            ("batch of long chains", butterfly, [samples, whole, whole, whole, whole], samples),
            ("column", btt, column, features),
            ("column of rank 2: gathered", rank2, column, whole),
            ("column of a Monarch: gathered", monarch, column, whole),
            ("row", btt, row, Partial()),
            ("row of rank 2", rank2, row, Partial()),
            ("row of a Monarch", monarch, row, Partial()),
        ):
            yield (name, chain, *operands(operator, columns), places, out)
        factors = [torch.randn(s, dtype=torch.float64) for s in ((3, 2), (2, 4))]
        x = torch.randn((8, 4) if columns else (4, 8), dtype=torch.float64)
        tensors = [x, torch.randn(6, dtype=torch.float64), *factors]
        yield "kron", torch.ops.structmat.kron, tensors, (columns,), [samples, whole, whole, whole], samples


def work(rank: int, port: int) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    for name, op, tensors, rest, places, out in cases():
        for frozen in ((), (0,), (1, 2), (0, 1, 2)):
            plain = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
            y = op(plain[0], plain[1], plain[2:], *rest)
            dy = torch.randn_like(y)
            y.backward(dy)
            split = [
                distribute_tensor(t.detach(), mesh, [place]).requires_grad_(t.requires_grad)
                for t, place in zip(plain, places, strict=True)
            ]
            z = op(split[0], split[1], split[2:], *rest)
            assert z.placements == (out,), (name, z.placements)
            torch.testing.assert_close(z.full_tensor(), y.detach())
            z.backward(distribute_tensor(dy, mesh, [Replicate()]))
            for i, (t, s) in enumerate(zip(plain, split, strict=True)):
                assert (s.grad is None) == (i in frozen)
                if i not in frozen:
                    torch.testing.assert_close(s.grad.full_tensor(), t.grad, msg=f"{name} {i}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_every_split_is_the_whole():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port,), 2)


def test_shares_of_factors_that_do_not_fit_are_refused():
    btt = sm.BlockTensorTrain.random((12, 8), blocks=(2, 4), rng=0)
    tensors, (code, _) = operands(btt, False)
    x, bias, left, right = tensors
    part = torch.ops.structmat.chain(x, bias[:6], [left[:1], right[:, :1]], code)
    torch.testing.assert_close(part, torch.ops.structmat.chain(x, bias, [left, right], code)[:, :6])
    with pytest.raises(ValueError, match="factors of shapes"):
        torch.ops.structmat.chain(x, bias[:6], [left[:1], right], code)
    monarch = sm.Monarch.random((12, 8), blocks=2, rng=0)
    (x, bias, left, right), (code, _) = operands(monarch, False)
    with pytest.raises(ValueError, match="factors of shapes"):
        torch.ops.structmat.chain(x, bias[:6], [left[:1], right[:, :1]], code)
