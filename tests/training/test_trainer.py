"""DistillationTrainer: its loss, gradient accumulation, schedules and logging against plain PyTorch loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from logitcache import models
from logitcache.errors import ObjectiveError
from logitcache.losses import Objective
from logitcache.reader import CacheDataset, ReaderOptions, batch_targets
from logitcache.store import open_cache
from logitcache.training import AlphaSchedule, BlendSchedule, DistillationSettings, DistillationTrainer
from tests.caches import Dumped
from tests.tiny import tiny_model
from tests.training.batches import dense_terms, logged, mask_labels, read_batches, trainer_of, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

BUCKET = Objective.forward_kl("bucket")


def settings(alpha: float = 0.9, **fields: Any) -> DistillationSettings:
    return DistillationSettings(fields.pop("objective", BUCKET), AlphaSchedule(peak=alpha), **fields)


def plain_loop(model: Any, batches: list[Any], loss: Any) -> list[float]:
    """AdamW as everybody writes it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for batch in batches:
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def assert_same_weights(one: Any, other: Any) -> None:
    """Adam divides by the gradient's size, so a rounding of a gradient near 0 moves a weight a little."""
    for name, value in weights_of(one).items():
        torch.testing.assert_close(value, weights_of(other)[name], rtol=1e-4, atol=5e-5, msg=name)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_loss_is_the_mix_of_ce_and_kl(dumped: Dumped, family: str, tmp_path: Path) -> None:
    batches = read_batches(dumped.top_k, 4, 4)
    mask_labels(batches)
    trainer = trainer_of(tiny_model(family, seed=5), batches, settings(0.7), tmp_path, 4)
    trainer.train()

    def mixed(model: Any, batch: Any) -> torch.Tensor:
        ce, kl = dense_terms(model, batch)
        return 0.3 * ce + 0.7 * kl

    by_hand = tiny_model(family, seed=5)
    expected = plain_loop(by_hand, batches, mixed)
    assert logged(trainer, "loss") == pytest.approx(expected, rel=1e-4)
    mixture = [0.3 * ce + 0.7 * kl for ce, kl in zip(logged(trainer, "ce"), logged(trainer, "divergence"), strict=True)]
    assert mixture == pytest.approx(expected, rel=1e-4)
    assert logged(trainer, "alpha") == [0.7] * 4
    assert min(logged(trainer, "tokens_per_second")) > 0
    assert_same_weights(trainer.model, by_hand)


@pytest.mark.parametrize("by_alpha", [False, True])
def test_labels_alone_are_a_plain_training_loop(dumped: Dumped, by_alpha: bool, tmp_path: Path) -> None:
    """Objective.cross_entropy() and alpha = 0 are the same; neither reads targets."""
    batches = read_batches(dumped.top_k, 4, 5)
    mask_labels(batches)
    chosen = settings(0.0) if by_alpha else settings(objective=Objective.cross_entropy())
    assert chosen.labels_only
    without = [{name: batch[name] for name in ("input_ids", "labels")} for batch in batches]
    trainer = trainer_of(tiny_model("llama", seed=5), without, chosen, tmp_path, 5)
    trainer.train()

    def cross_entropy(model: Any, batch: Any) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    by_hand = tiny_model("llama", seed=5)
    expected = plain_loop(by_hand, batches, cross_entropy)
    assert logged(trainer, "loss") == pytest.approx(expected, rel=1e-5)
    assert logged(trainer, "ce") == pytest.approx(expected, rel=1e-5)
    assert not logged(trainer, "divergence")
    assert_same_weights(trainer.model, by_hand)


def test_accumulation_counts_tokens_not_batches(dumped: Dumped, tmp_path: Path) -> None:
    """Once 8 blocks, or 4 times 2, whose numbers of counted tokens differ widely."""
    small = read_batches(dumped.top_k, 2, 12)
    mask_labels(small)
    small[1]["labels"][:] = -100
    counts = [int((batch["labels"] != -100).sum()) for batch in small[:4]]
    assert max(counts) > 2 * sorted(counts)[1] > 0
    large = read_batches(dumped.top_k, 8, 3)
    for number, batch in enumerate(large):
        batch["labels"] = torch.cat([part["labels"] for part in small[4 * number : 4 * number + 4]])
    runs = []
    for name, batches, accumulate in (("large", large, 1), ("small", small, 4)):
        trainer = trainer_of(
            tiny_model("llama", seed=5),
            batches,
            settings(),
            tmp_path / name,
            3,
            gradient_accumulation_steps=accumulate,
        )
        trainer.train()
        runs.append(trainer)
    for name in ("loss", "ce", "divergence"):
        assert logged(runs[0], name) == pytest.approx(logged(runs[1], name), rel=1e-5), name
    assert_same_weights(runs[0].model, runs[1].model)


def test_a_batch_without_labels_moves_nothing(dumped: Dumped, tmp_path: Path) -> None:
    batches = read_batches(dumped.top_k, 2, 1)
    batches[0]["labels"][:] = -100
    model = tiny_model("llama", seed=5)
    before = weights_of(model)
    trainer_of(model, batches, settings(), tmp_path, 1).train()
    for name, value in weights_of(model).items():
        assert torch.equal(value, before[name])


def test_alpha_follows_its_schedule(dumped: Dumped, tmp_path: Path) -> None:
    batches = read_batches(dumped.top_k, 2, 5)
    schedule = AlphaSchedule("wsd", 0.8, warmup=0.25, decay=0.5)
    trainer = trainer_of(tiny_model("llama"), batches, DistillationSettings(BUCKET, schedule), tmp_path, 5)
    trainer.train()
    alphas = logged(trainer, "alpha")
    assert alphas == pytest.approx([0, 0.8, 0.8, 0.4, 0])
    expected = [
        (1 - alpha) * ce + alpha * kl
        for alpha, ce, kl in zip(alphas, logged(trainer, "ce"), logged(trainer, "divergence"), strict=True)
    ]
    assert logged(trainer, "loss") == pytest.approx(expected, rel=1e-5)


def test_logged_values_are_means_since_the_last_log(dumped: Dumped, tmp_path: Path) -> None:
    batches = read_batches(dumped.top_k, 2, 4)
    mask_labels(batches)
    runs = [trainer_of(tiny_model("llama"), batches, settings(), tmp_path, 4, logging_steps=every) for every in (1, 2)]
    for run in runs:
        run.train()
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    each = logged(runs[0], "ce")
    pairs = [sum(each[i] * counts[i] for i in pair) / sum(counts[i] for i in pair) for pair in ((0, 1), (2, 3))]
    assert logged(runs[1], "ce") == pytest.approx(pairs, rel=1e-6)


def test_evaluation_leaves_training_as_it_was(dumped: Dumped, tmp_path: Path) -> None:
    """An evaluator sees the model in eval mode; losses and dropout are those of a run without it."""
    modes = []

    def evaluator(model: Any) -> dict[str, float]:
        modes.append(model.training)
        return {"ce": 1.5}

    losses = []
    for watched in (True, False):
        model = tiny_model("llama", seed=5, attention_dropout=0.3)
        args = trainer_of(model, [], settings(), tmp_path, 3).args
        if watched:
            args.eval_strategy, args.eval_steps = "steps", 1
        batches = read_batches(dumped.top_k, 2, 3)
        torch.manual_seed(0)
        trainer = DistillationTrainer(model, args, batches, settings(), evaluator if watched else None)
        trainer.train()
        losses.append(logged(trainer, "loss"))
        if watched:
            assert logged(trainer, "eval_ce")[-3:] == [1.5] * 3
    assert losses[0] == losses[1]
    assert modes
    assert not any(modes)


@pytest.mark.parametrize("interval", [1, 2])
def test_only_training_counts_as_time(
    interval: int, dumped: Dumped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes a second of this clock; an evaluation, and what callbacks do of a checkpoint, minutes."""
    seconds = [0.0]
    monkeypatch.setattr("logitcache.training.trainer.time.perf_counter", lambda: seconds[0])

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds[0] += 1

        def on_save(self, *_: Any, **__: Any) -> None:
            seconds[0] += 300

    def evaluator(model: Any) -> dict[str, float]:
        seconds[0] += 500
        return {"ce": 1.5}

    args = trainer_of(tiny_model("llama"), [], settings(), tmp_path, 6).args
    args.eval_strategy = args.save_strategy = "steps"
    args.eval_steps, args.save_steps, args.logging_steps = 1, interval, 2
    batches = read_batches(dumped.top_k, 2, 6)
    trainer = DistillationTrainer(tiny_model("llama"), args, batches, settings(), evaluator, callbacks=[Clock()])
    trainer.train()
    labels = [int((batch["labels"] != -100).sum()) for batch in batches]
    assert logged(trainer, "tokens_per_second") == [sum(labels[step : step + 2]) / 2 for step in (0, 2, 4)]


def test_without_an_evaluator(dumped: Dumped, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_model("llama"), read_batches(dumped.top_k, 2, 1), settings(), tmp_path, 1)
    assert trainer.evaluate() == {}


def test_blend_follows_its_schedule(dumped: Dumped, tmp_path: Path) -> None:
    """The same student and batches at a learning rate of 0: the divergence moves with the share alone."""
    batches = read_batches(dumped.varopt, 2, 1) * 5
    blended = Objective.forward_kl("blend")
    kind = {"unbiased": True, "has_exact_head": True}
    runs = []
    for chosen in (
        settings(1.0, objective=blended, blend=BlendSchedule(0.0, 1.0), **kind),
        settings(1.0, **kind),
        settings(1.0, objective=Objective.forward_kl("unbiased"), **kind),
    ):
        runs.append(trainer_of(tiny_model("llama", seed=5), batches, chosen, tmp_path, 5, learning_rate=0.0))
        runs[-1].train()
    assert logged(runs[0], "blend") == [0, 0.25, 0.5, 0.75, 1]
    assert not logged(runs[1], "blend")
    bucket, unbiased = (logged(run, "divergence")[0] for run in runs[1:])
    expected = [(1 - share) * bucket + share * unbiased for share in (0, 0.25, 0.5, 0.75, 1)]
    assert logged(runs[0], "divergence") == pytest.approx(expected, rel=1e-6)
    assert abs(bucket - unbiased) > 1e-3


@pytest.mark.parametrize("objective", [BUCKET, Objective.cross_entropy()])
def test_z_loss_is_logged_and_added(objective: Objective, dumped: Dumped, tmp_path: Path) -> None:
    batches = read_batches(dumped.top_k, 2, 3)
    mask_labels(batches)
    trainer = trainer_of(tiny_model("llama", seed=5), batches, settings(objective=objective, z_loss=0.01), tmp_path, 3)
    trainer.train()
    with torch.no_grad():
        logits = tiny_model("llama", seed=5)(input_ids=batches[0]["input_ids"]).logits
    lse = logits[batches[0]["labels"] != -100].double().logsumexp(-1)
    assert logged(trainer, "z_loss")[0] == pytest.approx(0.01 * float((lse**2).mean()), rel=1e-5)
    divergence = logged(trainer, "divergence") or logged(trainer, "ce")
    mixed = [
        0.1 * ce + 0.9 * other + z
        for ce, other, z in zip(logged(trainer, "ce"), divergence, logged(trainer, "z_loss"), strict=True)
    ]
    assert logged(trainer, "loss") == pytest.approx(mixed, rel=1e-4)


def test_a_policy_gradient_reads_the_teacher_of_the_label(dumped: Dumped, tmp_path: Path) -> None:
    """In a plain loop: -A log p(label), with A held fixed."""
    batches = read_batches(dumped.sample, 4, 3)
    mask_labels(batches)
    chosen = settings(1.0, objective=Objective.policy_gradient(0.5), unbiased=True, has_exact_head=False)
    trainer = trainer_of(tiny_model("llama", seed=5), batches, chosen, tmp_path, 3)
    trainer.train()

    def policy_gradient(model: Any, batch: Any) -> torch.Tensor:
        mask = batch["labels"] != -100
        log_p = model(input_ids=batch["input_ids"]).logits[mask].log_softmax(-1)
        log_p = log_p.gather(1, batch["labels"][mask][:, None]).squeeze(1)
        teacher = batch["targets"]["label_logprob"].unflatten(0, mask.shape)[mask]
        return -((teacher - log_p.detach()).clamp(-0.5, 0.5) * log_p).mean()

    by_hand = tiny_model("llama", seed=5)
    assert logged(trainer, "loss") == pytest.approx(plain_loop(by_hand, batches, policy_gradient), rel=1e-4)
    assert_same_weights(trainer.model, by_hand)


@pytest.mark.parametrize(("cache", "tail"), [("dense", "bucket"), ("top_k", "renormalised"), ("sample", "unbiased")])
def test_a_student_learns_what_the_teacher_knows(dumped: Dumped, cache: str, tail: str, tmp_path: Path) -> None:
    """The teacher with noise on its weights finds its way back, from a real dataset."""
    opened = open_cache(getattr(dumped, cache))
    student = models.load_model(dumped.teacher, device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    dataset = CacheDataset(opened, ReaderOptions(8))
    chosen = DistillationSettings(Objective.forward_kl(tail), AlphaSchedule(peak=1.0), unbiased=opened.unbiased)
    trainer = trainer_of(student, dataset, chosen, tmp_path, 60, learning_rate=3e-3)
    trainer.train()
    losses = logged(trainer, "divergence")
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    if cache == "dense":
        assert last < 0.3 * first
    else:
        assert last < 0.8 * first


def test_the_exact_head_of_samples_trains_as_a_short_top_k(dumped: Dumped, tmp_path: Path) -> None:
    """Rows with a threshold, as varopt's: tail='bucket' reads their head only. Without one it is refused."""
    whole, heads = read_batches(dumped.top_k, 4, 2), read_batches(dumped.top_k, 4, 2)
    for sampled, head in zip(whole, heads, strict=True):
        sampled["targets"]["threshold"] = torch.full_like(sampled["targets"]["threshold"], 0.02)
        rest = sampled["targets"]["weights"] <= 0.02
        assert rest.any()
        assert not rest.all()
        short = batch_targets(sampled, unbiased=True).exact_head()
        head["targets"] = {name: getattr(short, name) for name in sampled["targets"]}
    losses = []
    for batches, kind in ((whole, {"unbiased": True, "has_exact_head": True}), (heads, {})):
        trainer = trainer_of(tiny_model("llama", seed=5), batches, settings(1.0, **kind), tmp_path, 2)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]
    refused = settings(1.0, unbiased=True, has_exact_head=False)
    with pytest.raises(ObjectiveError, match="dump a cache with --select varopt:K"):
        trainer_of(tiny_model("llama"), whole, refused, tmp_path, 1).train()
