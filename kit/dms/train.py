"""Trains evictors: distills the model with soft eviction gates from the same model without.

The loss is the KL divergence between student and teacher plus a hinge on the eviction rate, which
follows a schedule over all layers and heads together: where memory is spent is up to the evictor.
Recipes are in `kit.dms.evictor`. Trained parameters, of evictors and of whole models, are float32:
bfloat16 would lose the steps of AdamW. A killed training resumes at the same step and data.

Sources: Dynamic Memory Sparsification, https://arxiv.org/abs/2506.05345;
https://github.com/NVIDIA/Model-Optimizer, experimental/dms at a2fbac7.
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from kit.data import prompts
from kit.data.problems import ProblemSet
from kit.dms import distillation
from kit.dms.evictor import Evictor, EvictorRecipe
from kit.dms.gates import Gates, hidden, measure
from kit.evaluation.evaluate import evaluate
from kit.evaluation.store import Store
from kit.inference.decode import slots_attached
from kit.inference.kv_cache import layer_windows
from kit.models.checkpoint import ResumableTraining
from kit.models.load import Model, twin
from kit.schema import Sampling, digest


def own_traces(
    model: Model,
    problems: ProblemSet,
    store: Store,
    max_new_tokens: int = 160,
    batch_size: int = 64,
) -> list[str]:
    """Chats in which the model answers problems of a training split, as text to train on."""
    if problems.split == "test":
        raise ValueError(f"{problems.name} test cannot be training text; use its train split.")
    sampling = Sampling(max_new_tokens, temperature=0.6, top_p=0.95)
    queue = [prompts.plain(problem) for problem in problems.problems]
    records = evaluate(model, queue, sampling, store, batch_size=batch_size)
    answers = dict(zip(records["problem_id"], records["text"], strict=True))
    return [
        model.tokenizer.apply_chat_template(
            [*prompt.chat, {"role": "assistant", "content": answers[prompt.problem.id]}],
            tokenize=False,
        )
        for prompt in queue
    ]


def pack_documents(model: Model, documents: list[str], context: int, seed: int = 0) -> torch.Tensor:
    """Documents, shuffled and concatenated, as sequences of exactly `context` tokens: [S, context].

    A document goes on in the next sequence; a remainder shorter than a sequence is dropped. The
    official data pipeline begins each sequence with a document and drops what does not fit.
    """
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    ids: list[int] = []
    for i in order.tolist():
        ids += model.tokenizer(documents[i], add_special_tokens=False)["input_ids"]
    count = len(ids) // context
    if not count:
        raise ValueError(
            f"{len(documents)} documents hold {len(ids)} tokens, less than one sequence of "
            f"{context}; give more documents or a smaller context."
        )
    return torch.tensor(ids[: count * context]).view(count, context)


class EvictorTraining(ResumableTraining):
    """One training of an evictor; state and evictors lie in a folder of its own under `folder`.

    `student` is `model` itself where only the evictor is trained, otherwise a float32 copy whose
    weights are trained, under autocast where the model is bfloat16. A float16 model is always
    copied: its gradients would underflow.
    """

    def __init__(
        self,
        model: Model,
        data: torch.Tensor,
        recipe: EvictorRecipe,
        folder: Path,
        seed: int = 0,
        micro_batch: int | None = None,
        checkpointing: bool = False,
    ):
        if data.shape[0] < recipe.batch:
            raise ValueError(
                f"{data.shape[0]} sequences of {data.shape[1]} tokens are fewer than a batch of "
                f"{recipe.batch}; give more text or a smaller batch."
            )
        identity = [asdict(recipe), model.weights_hash, str(model.dtype), seed, hash_ids(data)]
        super().__init__(folder, identity, recipe.steps)
        self.model, self.data, self.recipe, self.seed = model, data, recipe, seed
        self.micro_batch, self.checkpointing = micro_batch, checkpointing
        everything = recipe.trains == "all"
        precise = torch.promote_types(model.dtype, torch.float32)
        apart = everything or model.dtype == torch.float16
        weights = twin(model.weights, precise) if apart else model.weights
        self.student = dataclasses.replace(model, weights=weights)
        self.evictor = Evictor(weights, recipe, model.weights_hash)
        weights.requires_grad_(everything)
        self.parameters |= {f"evictor.{k}": p for k, p in self.evictor.named_parameters()}
        if everything:
            self.parameters |= {f"base.{k}": p for k, p in weights.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.windows = layer_windows(weights.config.get_text_config())
        self._teacher: dict[int, torch.Tensor] = {}  # sequence -> its final hidden states
        self.resume()

    def batch(self, step: int) -> list[int]:
        """Sequences of one step: the data in a new order in each epoch."""
        size, count = self.recipe.batch, len(self.data)
        per_epoch = count // size
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(count, generator=_generator("cpu", self.seed, epoch))
        return order[place * size : (place + 1) * size].tolist()

    def step(self) -> dict:
        """One optimizer step: KL, hinge, target and eviction rate, gradient norm and seconds.

        KL is a mean over the tokens of the batch, the hinge one over its sequences, and both are
        the same whatever `micro_batch` is.
        """
        started, number, recipe = time.perf_counter(), len(self.history), self.recipe
        rows, device = self.batch(number), self.model.device
        ids, target = self.data[rows].to(device), 1 - 1 / recipe.compression(number + 1)
        generator = _generator(device, self.seed, number + 1_000_000)
        size = len(rows), self.evictor.heads, ids.shape[1]
        noise = {
            layer: torch.rand(size, generator=generator, device=device)
            for layer in self.evictor.layers
        }
        self.evictor.fade = max(0.0, 1 - number / recipe.fade_steps) if recipe.fade_steps else 0.0
        self.optimizer.zero_grad()
        count, parts = int(self._scored(ids).sum()), []
        for part in torch.arange(len(rows)).split(self.micro_batch or len(rows)):
            where = slice(int(part[0]), int(part[-1]) + 1)
            drawn = {layer: uniform[where] for layer, uniform in noise.items()}
            gates = Gates(self.windows, recipe.window, recipe.temperature, drawn)
            parts.append(self._accumulate(rows[where], ids[where], gates, target, count))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        kl, hinge, closed = torch.stack(parts).sum(0).tolist()
        figures = dict(step=number + 1, kl=kl, hinge=hinge / len(rows), closed=closed / len(rows))
        figures |= dict(target=target, gradient_norm=float(norm))
        self.history.append({**figures, "seconds": time.perf_counter() - started})
        return self.history[-1]

    def _accumulate(self, rows, ids, gates: Gates, target: float, count: int) -> torch.Tensor:
        """Adds the gradients of the sequences `ids` [B, T] of a batch, in which `count` tokens are
        scored: their share of its KL, and the sums of their hinges and of their closed gates."""
        student, scored = self.student, self._scored(ids)
        heads = student.weights.lm_head.weight, self.model.weights.lm_head.weight.detach()
        with slots_attached(self.model), slots_attached(student):
            expected = self._teach(rows, ids)[scored]
            with self.evictor.attached(student.weights), self._checkpointing():
                with self._computing():
                    states = hidden(student.weights, ids, gates)
                kl = distillation.divergence(
                    states[scored], expected, *heads, self.recipe.divergence
                ) * (int(scored.sum()) / count)
                closed = gates.eviction_rate(self._lengths(ids))
                hinge = (target - closed).clamp_min(0).sum()
                (kl + self.recipe.hinge_weight * hinge / self.recipe.batch).backward()
        return torch.stack([kl, hinge, closed.sum()]).detach()

    def _scored(self, ids: torch.Tensor) -> torch.Tensor:
        """Tokens whose predictions are compared: all but those that end a sequence [B, T]."""
        tokenizer = self.model.tokenizer
        return (ids != tokenizer.eos_token_id) if tokenizer else ids > -1

    def _lengths(self, ids: torch.Tensor) -> torch.Tensor:
        """Tokens of each sequence up to the first of those that pad its end: [B]."""
        padding = ~self._scored(ids).flip(1).cumsum(1).bool()
        return (ids.shape[1] - padding.sum(1) + 1).clamp_max(ids.shape[1])

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Layers keep what goes into them alone, and are computed again in the backward pass."""
        weights = self.student.weights
        if self.checkpointing:
            weights.gradient_checkpointing_enable({"use_reentrant": False})
            weights.train()  # without which transformers does not; no model here has dropout
        try:
            yield
        finally:
            if self.checkpointing:
                weights.gradient_checkpointing_disable()
                weights.eval()

    def _computing(self) -> torch.autocast:
        """Autocast to bfloat16 where the teacher is bfloat16 and the student is not."""
        rounds = self.model.dtype == torch.bfloat16 != self.student.dtype
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=rounds)

    def _teach(self, rows: list[int], ids: torch.Tensor) -> torch.Tensor:
        """The teacher's final hidden states; cached where later epochs need them again."""
        if len(self.data) * 2 > self.recipe.steps * self.recipe.batch:
            with torch.no_grad():
                return hidden(self.model.weights, ids, Gates(self.windows))
        fresh = [i for i, row in enumerate(rows) if row not in self._teacher]
        if fresh:
            with torch.no_grad():
                states = hidden(self.model.weights, ids[fresh], Gates(self.windows))
            self._teacher |= {rows[i]: state.cpu() for i, state in zip(fresh, states)}
        return torch.stack([self._teacher[row] for row in rows]).to(ids.device)

    def run(
        self,
        checkpoints: Sequence[float] = (),
        report: Callable[[dict], None] = lambda figures: None,
        held_out: torch.Tensor | None = None,
    ) -> dict[float, Path]:
        """Train to the end of the schedule: the evictor's file per compression in `checkpoints`.

        The last one is always saved. With `held_out` [S, T] each card states the KL on it.
        """
        milestones = {self.recipe.fade_steps + self.recipe.steps_to(x): x for x in checkpoints}
        milestones[self.recipe.steps] = self.recipe.compression_x
        files = {x: self.folder / f"{x:g}x.safetensors" for x in milestones.values()}

        def publish(step: int) -> bool:
            if step in milestones:
                self._publish(files[milestones[step]], held_out)
            return step in milestones

        self.train(report, publish)
        return files

    def _publish(self, file: Path, held_out) -> None:
        """Write the evictor as it is now, with its card."""
        evictor, steps = copy.deepcopy(self.evictor), len(self.history)
        evictor.fade = 0.0
        for parameter in evictor.parameters():  # as it will be stored
            parameter.data = parameter.data.half().float()
        evictor.card = dict(base=self.model.name, seed=self.seed, steps=steps, job=self.job)
        evictor.card |= dict(target_x=self.recipe.compression(steps), data=hash_ids(self.data))
        trained = self.recipe.trains == "all"
        if held_out is not None:
            weights = twin(self.student.weights, self.model.dtype) if trained else None
            student = dataclasses.replace(self.model, weights=weights or self.model.weights)
            means = measure(student, evictor, held_out, teacher=self.model).mean()
            evictor.card |= dict(kl=means["kl"], compression_x=1 / means["kept_fraction"])
        evictor.save(file, dict(self.student.weights.named_parameters()) if trained else None)


def hash_ids(ids: torch.Tensor) -> str:
    """Hash of token ids and their shape: 12 hex digits."""
    return digest([list(ids.shape), ids.flatten().tolist()], 12)


def _generator(device, *seeds: int) -> torch.Generator:
    """A generator that depends on all of `seeds`."""
    return torch.Generator(device).manual_seed(int(digest(seeds, 15), 16))
