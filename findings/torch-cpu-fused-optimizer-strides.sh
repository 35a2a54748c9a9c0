#!/usr/bin/env bash
# torch 2.15.0 on a processor, optimizers with `fused=True` (AdamW, SGD with momentum, Adagrad): the order in which a
# tensor lies in memory is not heeded. Where moments or gradients lie otherwise than their weight, the step is another
# one, without a word. So it is with a network in `channels_last` whose optimizer state was read from a file.
#
# Expected: the steps of `fused=False`, to rounding. Seen, a convolution's weight in channels_last, three steps, the
# largest difference of a weight between the two (the moments are brought into an order after the first step, as
# `load_state_dict` leaves what it is given):
#
#     AdamW    moments and gradients as the weight  6e-08    moments contiguous  0.027
#     SGD      moments and gradients as the weight  0        moments contiguous  0.066
#     Adagrad  moments and gradients as the weight  6e-08    moments contiguous  0.015
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch


def trained(kind, options, moments, fused):
    torch.manual_seed(0)
    start = torch.randn(4, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    weight = torch.nn.Parameter(start)
    optimizer = kind([weight], lr=1e-2, fused=fused, **options)
    for step in range(3):
        weight.grad = torch.randn(4, 6, 3, 3).contiguous(memory_format=torch.channels_last)
        optimizer.step()
        if step == 0:
            for key, value in optimizer.state[weight].items():
                if torch.is_tensor(value) and value.dim() == 4:
                    optimizer.state[weight][key] = value.contiguous(memory_format=moments)
    return weight.detach()


print(f"torch {torch.__version__}")
optim = torch.optim
for kind, options in ((optim.AdamW, {}), (optim.SGD, {"momentum": 0.9}), (optim.Adagrad, {})):
    alike, other = (
        float((trained(kind, options, order, True) - trained(kind, options, order, False)).abs().max())
        for order in (torch.channels_last, torch.contiguous_format)
    )
    print(f"{kind.__name__:8} moments as the weight {alike:.2g}, moments contiguous {other:.2g}")
    assert alike < 1e-6, "changed: the same steps differ"
    assert other > 1e-3, "changed: the order is heeded"
PYTHON
