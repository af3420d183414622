"""What processes of `test_linear_machine` run, and print."""

import ctypes
import hashlib
import mmap
from itertools import product

import numba
import torch
from torch import Tensor

from headrace.kernels.cpu import CpuOps, launch
from kernels.attention_kit import attend, sequence
from kernels.product_kit import DTYPES, STORAGES, assert_bits, bits, definition, multiply, normal

SPANS, BOUNDS = ((0, 0, 0, 544), (1, 544, 544, 556)), (0, 544, 1100)


def tell(*name: object, of: tuple[Tensor, ...]) -> None:
    """A line "name/…/hash of the bits"."""
    digest = hashlib.sha256(b"".join(bits(x).numpy().tobytes() for x in of)).hexdigest()
    print(*name, digest, sep="/")


def products(threads: int) -> None:
    """Prints the bits of products of few and many rows, the threading layer and the registers."""
    ops = CpuOps(threads=threads)
    x, w, bias = normal(35, 1100), normal(77, 1100, seed=1), normal(77, seed=2)
    for dtype, rows in product((torch.float32, torch.bfloat16), (1, 2, 4, 8, 16, 35)):
        some, weight = x[:rows].contiguous(), w.to(dtype)
        for storage in STORAGES:
            of = multiply(some, weight, storage, bias, SPANS), multiply(some, weight, storage, turned=True)
            tell(storage, dtype, rows, of=of)
        small = some[:, :33].contiguous(), weight[:, :33].contiguous()
        tell("linear", dtype, rows, of=(ops.linear(some, weight, bias, BOUNDS), ops.linear(*small)))
        g, spans = normal(rows, 77), ((0, 0, 0, 40), (1, 40, 40, 37))
        tell("input", dtype, rows, of=(ops.linear_backward_input(g, weight, spans),))
    for rows in (1, 2, 4, 8, 16, 35):
        some, turned = x[:rows].contiguous(), x[:rows].T.contiguous()
        of = (ops.linear_backward_weight(some, normal(rows, 45)), ops.linear_backward_weight(turned, normal(1100, 45)))
        tell("weight", rows, of=of)
    long = normal(35, 4200), normal(77, 4200, seed=1).bfloat16()
    for storage in STORAGES:
        tell(storage, "long", of=(multiply(*long, storage), multiply(*long, storage, turned=True)))
    g, q, k, v, out = normal(5, 70, 2, 40)
    lse, starts = torch.full((70, 2), 3.0), torch.tensor([0, 9, 70], dtype=torch.int32)
    tell("attention", of=ops.attention_backward(g, q, k, v, out, lse, starts, 0.3))
    for group, dim in product((1, 2, 3, 4, 7), (20, 64)):
        keys = sequence(group, 300, 2, group, dim)
        tell("paged", group, dim, of=tuple(attend(ops, [(keys, 299, 300), (keys, 250, 300), (keys, 0, 9)])))
    tell("large", of=(ops.linear(normal(64, 512), normal(512, 512)),))
    if threads > 1:  # only a parallel kernel starts a layer
        print("layer", numba.threading_layer(), sep="/")
    print("width", "wide" if launch.WIDE else "narrow", sep="/")


class Pages:
    """Memory that ends before a page that may not be touched."""

    def __init__(self) -> None:
        self.protect = ctypes.CDLL(None).mprotect
        self.protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self.kept: list[mmap.mmap] = []

    def at_the_end(self, x: Tensor) -> Tensor:
        """A copy whose last byte is the last of its page."""
        count = x.numel() * x.element_size()
        size = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
        self.kept.append(mmap.mmap(-1, size + mmap.PAGESIZE))
        whole = torch.frombuffer(self.kept[-1], dtype=torch.uint8)
        assert self.protect(whole.data_ptr() + size, mmap.PAGESIZE, 0) == 0
        return whole[size - count : size].view(x.dtype).view(x.shape).copy_(x)


def edges() -> None:
    """Products whose operands lie at the end of a page, without and with other terms to their left."""
    ops, pages = CpuOps(threads=1), Pages()
    for dtype, terms, outputs in product(DTYPES, (1, 15, 16, 17, 31, 33, 300), (1, 15, 16, 17, 33)):
        w, bias = pages.at_the_end(normal(outputs, terms, seed=1).to(dtype)), pages.at_the_end(normal(outputs, seed=2))
        for rows in (1, 2, 4, 6, 8, 9, 16, 17):
            x, g = pages.at_the_end(normal(rows, terms)), pages.at_the_end(normal(rows, outputs))
            assert_bits(ops.linear(x, w, bias), definition(x, w, bias), dtype, rows, outputs, terms)
            ops.linear_backward_input(g, w, ((0, 0, 0, outputs),))
            ops.linear_backward_weight(g, x)
    print("alive")
