#!/usr/bin/env bash
# torch 2.15.0 on a processor, `masked_fill_` with a boolean mask (and `torch.where`): the time depends on how the mask
# is scattered, as each entry is a branch. The masks of unstructured pruning are the worst case.
#
# Expected: as the product with a mask of numbers, which reads more bytes: 590,000 entries of float32 in some 0.1 ms,
# whatever the mask. Seen, one thread, AMD EPYC (AVX2), microseconds; "sorted" is the same mask with its entries sorted:
#
#     masked   random   sorted   product with a mask of floats
#        0 %      388      381      64
#       50 %    2,494      655      64
#       75 %    1,532      857      64
#
# The figures are those of one machine; checked are two ratios at 50 %: random to sorted, and random to the product.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import time

import torch

torch.set_num_threads(1)
torch.manual_seed(0)
weight = torch.randn(1536, 384)


def microseconds(function):
    best = float("inf")
    for _ in range(30):
        begun = time.thread_time()  # of the processor: other work on the machine does not count
        for _ in range(20):
            function()
        best = min(best, (time.thread_time() - begun) / 20)
    return 1e6 * best


print(f"torch {torch.__version__}")
ratios = {}
for share in (0.0, 0.5, 0.75):
    scattered = torch.rand(weight.shape) < share
    ordered = scattered.flatten().sort().values.view(weight.shape)
    kept = (~scattered).float()
    random, in_order, product = (
        microseconds(function)
        for function in (
            lambda: weight.masked_fill_(scattered, 0.0),
            lambda: weight.masked_fill_(ordered, 0.0),
            lambda: weight.mul_(kept),
        )
    )
    ratios[share] = random / in_order, random / product
    print(f"{share:4.0%} masked: random {random:.0f}, sorted {in_order:.0f}, product {product:.0f} microseconds")
assert ratios[0.5][0] > 2, "changed: a scattered mask costs no more than a sorted one"
assert ratios[0.5][1] > 5, "changed: masked_fill_ is nearly as fast as a product"
PYTHON
