"""An actor of no framework: a table of next-token logits, trained through the loop like any other student."""

import dataclasses
from pathlib import Path

import torch

from opd_engine.distillation import Denominators, distillation_loss, row_divergences, score_rollouts
from opd_engine.distillation.actor import Capabilities, Saved, StepReport
from opd_engine.distillation.metrics import add_metrics
from opd_engine.distillation.rollout_engine import Completions, EngineState
from opd_engine.distillation.sampling import draw, uniform_rows
from opd_engine.teachers import LocalTeacher, WeightStore


class Table:
    """A ModelBackend: what follows a token depends on that token alone."""

    shard = None

    def __init__(self, vocab_size, seed):
        torch.manual_seed(seed)
        self.vocab_size, self.module = vocab_size, torch.nn.Embedding(vocab_size, vocab_size)

    def logits(self, batch):
        return self.module(batch.tokens)

    def token_to_id(self):
        return None


class ToyActor:
    capabilities = Capabilities(actor="toy", teacher_weights=("auto",))

    def __init__(self, table, config):
        self.table, self.config, self.vocab_size = table, config, table.vocab_size
        self.student, self.weights = LocalTeacher(table), WeightStore(table.module)
        self.optimizer = torch.optim.SGD(table.module.parameters(), lr=1.0)

    def token_to_id(self):
        return None

    def score_rollouts(self, batch, teachers):
        return score_rollouts(batch, self.student, teachers, self.config)

    def train_step(self, batch, scored, *, lr=None):
        self.optimizer.zero_grad()
        denominators = Denominators.of(batch, self.config)
        loss, metrics = distillation_loss(self.table.logits(batch), batch, scored, self.config, None, denominators)
        with self.weights.training():
            loss.backward()
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
        scored.release(batch)
        return StepReport(add_metrics([metrics]), True, None)

    def row_divergences(self, batch, scored):
        return row_divergences(self.student, batch, scored, self.config)

    def save(self, folder: Path):
        torch.save(self.table.module.state_dict(), folder / "table.pt")
        return Saved()

    def load(self, folder: Path):
        self.table.module.load_state_dict(torch.load(folder / "table.pt", weights_only=True))
        self.weights.accept_live()


class TableEngine:
    def __init__(self, table):
        self.table, self.state = table, EngineState.NONE

    def publish(self, publication):
        self.state = EngineState.FULL(publication.version)

    @torch.no_grad()
    def generate(self, prompts, sampling, *, seed):
        rows, log_probs, last = [], [], torch.tensor([prompt[-1] for prompt in prompts])
        for uniforms in uniform_rows(seed, sampling.max_new_tokens).T:
            log_q = self.table.module(last).log_softmax(-1)
            last = draw(log_q, uniforms) if sampling.temperature else log_q.argmax(-1)
            rows.append(last)
            log_probs.append(log_q.gather(1, last[:, None])[:, 0])
        tokens, values = torch.stack(rows, 1).tolist(), torch.stack(log_probs, 1).tolist()
        written = Completions(tokens=tokens, log_probs=values, finished=[False] * len(tokens))
        return dataclasses.replace(written, weight_version=[self.state.version] * len(tokens))
