"""Denoising groups: the noise is the paper's, nobody sees what they should not, and their number is bounded."""

from __future__ import annotations

import logging
import time

import pytest
import torch

from detr_family.modeling import denoising
from detr_family.modeling.denoising import box_slots, denoising_groups, flip_labels, group_mask, noise_boxes
from detr_family.modeling.structures import SetPrediction, Targets

DRAWS = 100_000


def truth(*counts: int, seed: int = 0) -> Targets:
    g = torch.Generator().manual_seed(seed)
    total = sum(counts)
    centres, sizes = torch.rand(2, total, 2, generator=g)
    return Targets(
        labels=torch.randint(5, (total,), generator=g),
        boxes_cxcywh=torch.cat([0.3 + 0.4 * centres, 0.1 + 0.2 * sizes], 1),
        image=torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
        counts=list(counts),
    )


def groups_of(targets: Targets, *, groups: int = 3, most: int = 1000, label: float = 0.0, box: float = 0.0, **more):
    return denoising_groups(
        targets,
        num_classes=5,
        num_queries=7,
        num_groups=groups,
        max_queries=most,
        label_noise=label,
        box_noise=box,
        eps=1e-3,
        **more,
    )


def test_centres_and_sizes_change_as_the_paper_says() -> None:
    """Uniform within lambda times half of the box, and within lambda times the box: bounds, means, variances."""
    box = torch.tensor([0.5, 0.4, 0.2, 0.1])
    noised = noise_boxes(box.expand(DRAWS, 4), 0.4, torch.Generator().manual_seed(1))
    most = torch.tensor([0.2 / 2, 0.1 / 2, 0.2, 0.1]) * 0.4
    shift = (noised - box) / most  # uniform in [-1, 1)
    assert shift.abs().max() < 1 + 1e-5 and (shift.abs().amax(0) > 0.999).all()
    assert shift.mean(0).abs().max() < 5 / (3 * DRAWS) ** 0.5
    torch.testing.assert_close(shift.var(0), torch.full((4,), 1 / 3), rtol=0.02, atol=0)
    assert torch.corrcoef(shift.T).fill_diagonal_(0).abs().max() < 0.02  # drawn apart
    inside = (noised[:, :2] - box[:2]).abs() < box[2:] / 2
    assert inside.all()


def test_noised_boxes_stay_in_the_unit_square() -> None:
    noised = noise_boxes(torch.tensor([0.02, 0.99, 0.9, 1.0]).expand(1000, 4), 1.0, torch.Generator().manual_seed(1))
    assert noised.min() == 0 and noised.max() == 1


def test_labels_flip_at_the_papers_rate() -> None:
    labels = torch.full((DRAWS,), 3)
    flipped = flip_labels(labels, 5, 0.2, torch.Generator().manual_seed(1))
    # A flipped label may be the true one: 0.2 * 4 / 5 are seen to change, evenly over the others.
    changed = flipped[flipped != 3]
    assert len(changed) / DRAWS == pytest.approx(0.16, abs=0.005)
    share = torch.bincount(changed, minlength=5) / len(changed)
    torch.testing.assert_close(share, torch.tensor([0.25, 0.25, 0.25, 0.0, 0.25]), rtol=0, atol=0.02)


def test_no_noise_gives_the_truth_once_in_every_group() -> None:
    targets = truth(3, 0, 2)
    groups = groups_of(targets)
    assert groups.labels.shape == (3, 9) and len(groups) == 9
    assert groups.padding.view(3, 3, 3).tolist() == [
        [[False] * 3] * 3,
        [[True] * 3] * 3,
        [[False, False, True]] * 3,
    ]
    assert groups.known.query.shape == groups.known.target.shape == (1, 15)
    for query, target in zip(groups.known.query[0], groups.known.target[0], strict=True):
        image = targets.image[target]
        assert groups.labels[image, query] == targets.labels[target]
        torch.testing.assert_close(groups.anchors[image, query].sigmoid(), targets.boxes_cxcywh[target])
    for group in range(3):
        inside = groups.known.query[0] // 3 == group
        assert sorted(groups.known.target[0][inside].tolist()) == [0, 1, 2, 3, 4]
    assert not groups.anchors[groups.padding].any()


def test_every_group_has_noise_of_its_own_and_a_seed_repeats_it() -> None:
    a, b, c = (groups_of(truth(4), label=0.5, box=0.4, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a.anchors, b.anchors) and torch.equal(a.labels, b.labels)
    assert not torch.equal(a.anchors, c.anchors)
    first, second, _ = a.anchors[0].view(3, 4, 4)
    assert (first - second).abs().min() > 0


def test_who_sees_whom() -> None:
    blocked = group_mask(2, 2, 3, torch.device("cpu"))
    see = ~blocked
    assert see[:2, :2].all() and see[2:4, 2:4].all()  # one's own group
    assert not see[:2, 2:4].any() and not see[2:4, :2].any()  # no other group
    assert see[:, 4:].all()  # everybody sees the matching part
    assert not see[4:, :4].any()  # which sees no ground truth


def test_no_boxes_anywhere() -> None:
    groups = groups_of(truth(0, 0), box=0.4, label=0.5)
    assert len(groups) == 0 and groups.blocked.shape == (7, 7) and not groups.blocked.any()


def test_the_number_of_denoising_queries_is_bounded(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(denoising, "_said", False)
    targets = truth(1000, 2, 0, 13)
    with caplog.at_level(logging.WARNING):
        groups = groups_of(targets, groups=5, most=50, box=0.4)
        groups_of(targets, groups=5, most=50)
    assert len(groups) == 50 and len(caplog.records) == 1 and "1000 boxes" in caplog.text
    assert groups.known.query.shape[1] == 5 * (10 + 2 + 10)
    target = groups.known.target[0].view(5, 22)
    chosen = {tuple(row[:10].sort().values.tolist()) for row in target}
    assert len(chosen) == 5  # drawn anew for each group
    for row in target:
        assert len(set(row.tolist())) == 22  # no box twice in a group
        assert targets.image[row].tolist() == [0] * 10 + [1] * 2 + [3] * 10
    assert (~groups.padding).sum(1).tolist() == [50, 10, 0, 50]


def test_every_box_is_drawn_as_often() -> None:
    targets = truth(2, 8)
    count = torch.zeros(10)
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        target, _, _ = box_slots(targets, 40, 4, g)
        count += torch.bincount(target.flatten(), minlength=10)
    torch.testing.assert_close(count[:2], torch.full((2,), 2000.0))
    torch.testing.assert_close(count[2:], torch.full((8,), 1000.0), rtol=0.12, atol=0)


def test_denoised_boxes_are_taken_without_the_padding() -> None:
    targets = truth(3, 1)
    groups = groups_of(targets)
    place = torch.arange(2 * 9, dtype=torch.float32).view(1, 2, 9, 1)
    prediction = SetPrediction(place.expand(2, -1, -1, 5), place.expand(2, -1, -1, 4))
    alone, known, pairs = groups.known_alone(prediction, targets)
    assert alone.layer_logits.shape == (2, 1, 12, 5) and known.counts == [12]
    assert alone.layer_logits[0, 0, :, 0].tolist() == [0, 1, 2, 9, 3, 4, 5, 12, 6, 7, 8, 15]
    assert torch.equal(known.labels, targets.labels.repeat(3)) and pairs.query.shape == (2, 12)


def test_groups_are_made_in_no_time() -> None:
    """16 images of 40 boxes, 5 groups: 2 ms at the most on one core (about 1 ms where nothing else runs)."""
    targets = truth(*[40] * 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    for _ in range(20):
        start = time.process_time()
        groups_of(targets, groups=5, label=0.2, box=0.4)
        times.append(time.process_time() - start)
    torch.set_num_threads(threads)
    assert min(times) < 2e-3
