"""Run by test_linear_memory.py in a process of its own: how far one call raises the peak of resident memory."""

import json
import re
import sys
from pathlib import Path

import torch

import opd_engine

ROWS, VOCAB, HIDDEN, K = 4_096, 65_536, 48, 64
FEWER_ROWS = {"through_logits": 1_024}  # the control needs no more


def status_bytes(name: str) -> int:
    return int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M).group(1)) * 1024


def grown(call) -> int:
    """Peak resident memory of the call above what was resident before it."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    call()
    return status_bytes("VmHWM") - before


def main(function: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, requires_grad=True)
    weight = (torch.randn(VOCAB, HIDDEN) / 8).requires_grad_()
    ids = (torch.arange(K) * 1_000 + torch.arange(ROWS)[:, None]) % VOCAB
    log_probs = torch.full((ROWS, K), -5.0)
    teacher = opd_engine.TokenScores(indices=ids, log_probs=log_probs, tail_log_prob=torch.full((ROWS,), -0.6))
    theirs = torch.randn(ROWS, 16), torch.randn(VOCAB, 16)
    half = weight.detach().bfloat16()
    with_main_grad = weight.detach().clone().requires_grad_()
    with_main_grad.main_grad = torch.zeros(VOCAB, HIDDEN)

    def backward(loss):
        torch.autograd.grad(loss, (hidden, weight))

    def distill(rows=ROWS, **more):
        some = slice(rows)
        backward(opd_engine.linear_distill_loss(hidden[some], weight, teacher.select(some), **more).loss)

    def distill_softcap(rows=ROWS):
        distill(rows, logit_softcap=5.0)

    def distill_bfloat16(rows=ROWS):
        mine = hidden[:rows].detach().bfloat16().requires_grad_(), half.requires_grad_()
        torch.autograd.grad(opd_engine.linear_distill_loss(*mine, teacher.select(slice(rows))).loss, mine)

    def distill_main_grad(rows=ROWS):
        opd_engine.linear_distill_loss(
            hidden[:rows], with_main_grad, teacher.select(slice(rows)), grad_scale=torch.tensor(1.0)
        ).loss.backward()

    def gather(rows=ROWS):
        some = slice(rows)
        scores = opd_engine.linear_gather_log_probs(hidden[some], weight, ids[some])
        backward(scores.log_probs.sum() + scores.tail_log_prob.sum())

    def gather_bfloat16(rows=ROWS):
        some = slice(rows)
        mine = hidden[some].detach().bfloat16().requires_grad_(), half.requires_grad_()
        scores = opd_engine.linear_gather_log_probs(*mine, ids[some])
        torch.autograd.grad(scores.log_probs.sum() + scores.tail_log_prob.sum(), mine)

    def topk(rows=ROWS):
        opd_engine.linear_topk_log_probs(hidden[:rows], weight, K)

    def full(rows=ROWS):
        some = slice(rows)
        backward(opd_engine.linear_full_distill_loss(hidden[some], weight, theirs[0][some], theirs[1]).loss)

    def through_logits(rows=ROWS):
        scores = opd_engine.gather_log_probs(hidden[:rows] @ weight.t(), ids[:rows])
        backward(opd_engine.distill_loss(scores, teacher.select(slice(rows))).sum())

    known = (distill, distill_softcap, distill_bfloat16, distill_main_grad)
    known = (*known, gather, gather_bfloat16, topk, full, through_logits)
    call = {known_call.__name__: known_call for known_call in known}[function]
    call(8)  # what libraries allocate once is not the call's
    print(json.dumps(grown(lambda: call(FEWER_ROWS.get(function, ROWS)))))


if __name__ == "__main__":
    main(sys.argv[1])
