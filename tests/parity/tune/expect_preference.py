"""Makes tests/golden/tune/preference.json: preference losses and their gradients by torch's autograd
in double, the expressions those of TRL's DPOTrainer, CPOTrainer, ORPOTrainer and KTOTrainer (DPOP as
its paper has it).

expect_preference.py OUT.json
"""
import itertools
import json
import pathlib
import sys

import torch
import torch.nn.functional as F
from trl.experimental.orpo.orpo_trainer import log1mexp

torch.set_default_dtype(torch.float64)


def log_1m_exp(x):
    return log1mexp(x)


def loss(kind, beta, eps, gamma, lam, c, r, rc, rr, nc, nr):
    dc, dr = c - rc, r - rr
    d = dc - dr

    def smoothed(x):
        return -F.logsigmoid(x) * (1 - eps) - F.logsigmoid(-x) * eps
    if kind == "sigmoid":
        return smoothed(beta * d)
    if kind == "robust":
        clean = -(1 - eps) * F.logsigmoid(beta * d)
        flipped = -eps * F.logsigmoid(-beta * d)
        return (clean - flipped) / (1 - 2 * eps)
    if kind == "hinge":
        return torch.relu(1 - beta * d)
    if kind == "ipo":
        return (dc / nc - dr / nr - 1 / (2 * beta)) ** 2
    if kind == "sigmoid_norm":
        return smoothed(beta * (dc / nc - dr / nr))
    if kind == "dpop":
        return smoothed(beta * (d - lam * torch.relu(rc - c)))
    if kind == "sppo_hard":
        return (dc - 0.5 / beta) ** 2 + (dr + 0.5 / beta) ** 2
    if kind == "apo_zero":
        return 1 - torch.sigmoid(beta * dc) + torch.sigmoid(beta * dr)
    if kind == "apo_down":
        return torch.sigmoid(beta * dc) + 1 - torch.sigmoid(beta * d)
    if kind == "simpo":
        return smoothed(beta * (c / nc - r / nr - gamma / beta))
    if kind == "orpo":
        mc, mr = c / nc, r / nr
        return -beta * F.logsigmoid((mc - mr) - (log_1m_exp(mc) - log_1m_exp(mr)))
    raise ValueError(kind)


KINDS = ["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "dpop", "sppo_hard", "apo_zero",
         "apo_down", "simpo", "orpo"]
LOGPS = [(-10.0, -12.0, -10.0, -12.0, 5, 7), (-31.5, -28.25, -40.0, -20.0, 11, 9),
         (-3.0, -90.0, -3.5, -60.0, 4, 30), (-250.0, -2.0, -200.0, -8.0, 120, 2),
         (-0.5, -0.25, -0.75, -0.125, 3, 1)]
rows = []
for kind, (beta, eps), logps in itertools.product(KINDS, [(0.1, 0.0), (0.5, 0.1), (2.0, 0.3)],
                                                  LOGPS):
    c, r = (torch.tensor(x, requires_grad=True) for x in logps[:2])
    value = loss(kind, beta, eps, 0.8, 5.0, c, r, *logps[2:])
    value.backward()
    rows.append({"kind": kind, "beta": beta, "eps": eps, "logps": logps, "loss": value.item(),
                 "by_chosen": c.grad.item(), "by_rejected": r.grad.item() if r.grad is not None else 0.0})
kto = []
for beta, kl, desirable, (logp, ref) in itertools.product(
        [0.1, 0.7], [0.0, 1.5], [True, False], [(-10.0, -10.0), (-30.0, -25.0), (-5.0, -9.5)]):
    x = torch.tensor(logp, requires_grad=True)
    value = (1.25 * (1 - torch.sigmoid(beta * ((x - ref) - kl))) if desirable
             else 0.75 * (1 - torch.sigmoid(beta * (kl - (x - ref)))))
    value.backward()
    kto.append({"beta": beta, "kl": kl, "desirable": desirable, "logp": logp, "ref": ref,
                "loss": value.item(), "by_logp": x.grad.item()})
pathlib.Path(sys.argv[1]).write_text(json.dumps(
    {"gamma": 0.8, "dpop_lambda": 5.0, "desirable_weight": 1.25, "undesirable_weight": 0.75,
     "pairs": rows, "kto": kto}, separators=(",", ":")) + "\n")
