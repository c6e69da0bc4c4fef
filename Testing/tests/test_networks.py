"""Networks: shapes, strides, slices that stay apart, and channels that are kept by structure name."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import TINY, model_card, random_network

from PresenceSegLib.domain.errors import InputError
from PresenceSegLib.domain.model import PLANES, NetworkSpec
from PresenceSegLib.domain.structure import StructureSet
from PresenceSegLib.engine.networks import (
    NETWORKS,
    build_network,
    default_spec,
    fit_to_stride,
    keep_channels,
    stride,
)

ABC = StructureSet.from_names(["a", "b", "c"])


@pytest.mark.parametrize("plane", ["", *PLANES])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_gives_a_logit_per_class_on_multiples_of_its_stride(name, plane):
    spec = default_spec(name, plane, (3.0, 1.0, 1.0), (8, 32, 32))
    step = stride(spec)
    if plane:
        assert step[PLANES.index(plane)] == 1
    size = [n + s for n, s in zip(fit_to_stride((1, 1, 1), step), step, strict=True)]  # an odd multiple
    network = build_network(spec, ABC)
    for x in (torch.randn(2, 1, *size), torch.randn(1, 1, *fit_to_stride((1, 1, 1), step))):
        logits = network(x)
        assert logits.shape == (len(x), 4, *x.shape[2:])
        assert logits.isfinite().all() and logits.std() > 0
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("plane", PLANES)
def test_slice_networks_see_each_slice_by_itself(plane):
    axis = PLANES.index(plane)
    step = tuple(1 if a == axis else 2 for a in range(3))
    network = build_network(NetworkSpec("unet", (4, 8), (step,), plane), ABC).eval()
    size = [8, 8, 8]
    size[axis] = 3
    x = torch.randn(2, 1, *size)
    with torch.inference_mode():
        together = network(x)
        for n in range(3):
            alone = network(x.narrow(axis + 2, n, 1))
            torch.testing.assert_close(together.narrow(axis + 2, n, 1), alone, atol=1e-5, rtol=1e-5)
            # the other way round: what the 2-D backbone and head make of the bare slice
            plain = network.head(network.backbone(x.select(axis + 2, n)))
            torch.testing.assert_close(together.select(axis + 2, n), plain, atol=1e-5, rtol=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    spacing=st.tuples(*[st.floats(0.3, 8)] * 3),
    patch=st.tuples(*[st.integers(2, 128)] * 3),
    name=st.sampled_from(["unet", "dynunet"]),
    plane=st.sampled_from(["", *PLANES]),
)
def test_axes_are_halved_only_while_they_are_fine_and_long_enough(spacing, patch, name, plane):
    spec = default_spec(name, plane, spacing, patch)
    fixed = PLANES.index(plane) if plane else None
    assert len(spec.strides) == len(spec.channels) - 1
    spacing, size = np.array(spacing), np.array(patch)
    for step in spec.strides:
        long_enough = [a for a in range(3) if a != fixed and size[a] >= 8]
        finest = min((spacing[a] for a in long_enough), default=None)
        for axis in range(3):
            may_halve = axis in long_enough and spacing[axis] <= 1.9 * finest
            assert step[axis] == (2 if may_halve else 1)
        spacing, size = spacing * step, size // step
    assert all(size >= np.minimum(patch, 4))


@given(size=st.tuples(*[st.integers(1, 200)] * 3), step=st.tuples(*[st.sampled_from([1, 2, 4, 8, 16])] * 3))
def test_fitted_sizes_are_the_least_multiples_of_the_stride_with_two_of_each(size, step):
    for n, s, fitted in zip(size, step, fit_to_stride(size, step), strict=True):
        candidates = range(s if s == 1 else 2 * s, 1000, s)
        assert fitted == next(c for c in candidates if c >= n)


@pytest.mark.parametrize(("name", "plane"), [("vnet", ""), ("", ""), ("unet", "oblique"), ("unet", "Axial")])
def test_unknown_networks_and_planes_are_refused_by_name(name, plane):
    with pytest.raises(InputError, match="unet, segresnet, dynunet" if plane == "" else "axial, coronal, sagittal"):
        default_spec(name, plane, (1, 1, 1), (32, 32, 32))


def test_a_card_naming_a_network_of_another_program_is_refused():
    with pytest.raises(InputError, match="swinunetr"):
        build_network(NetworkSpec("swinunetr", (4, 8), ((2, 2, 2),)), ABC)


NAMES = [f"structure {n}" for n in range(6)]


@settings(max_examples=60, deadline=None)
@given(
    known=st.permutations(NAMES).flatmap(lambda p: st.integers(1, 6).map(lambda n: p[:n])),
    wanted=st.permutations([*NAMES, "new 1", "new 2"]).flatmap(lambda p: st.integers(1, 8).map(lambda n: p[:n])),
)
def test_channels_are_kept_by_name_under_any_reordering_addition_and_removal(known, wanted):
    def state(names, offset):
        value = torch.tensor([offset] + [offset + 1.0 + n for n in range(len(names))])
        return {
            "backbone.x": torch.full((2, 2), offset),
            "head.weight": value[:, None].repeat(1, 5).view(-1, 5, 1, 1, 1),
            "head.bias": value * 2,
        }

    learned, fresh = state(known, 100.0), state(wanted, 500.0)
    before = {key: value.clone() for key, value in (learned | fresh).items()}
    result = keep_channels(learned, StructureSet.from_names(known), fresh, StructureSet.from_names(wanted))

    # background, then each wanted structure: 101 + its place among the known ones, or its own fresh row
    rows = [100.0] + [101.0 + known.index(w) if w in known else 501.0 + n for n, w in enumerate(wanted)]
    assert result["head.weight"].shape == (1 + len(wanted), 5, 1, 1, 1)
    assert result["head.weight"][:, 3, 0, 0, 0].tolist() == rows
    assert result["head.bias"].tolist() == [2 * r for r in rows]
    assert (result["backbone.x"] == 100).all()
    assert all(torch.equal(fresh[key], before[key]) for key in fresh), "the fresh weights were written to"


@pytest.mark.parametrize("plane", ["", "coronal"])
def test_kept_structures_get_the_same_logits_after_reordering_and_adding(plane):
    spec = TINY if not plane else NetworkSpec("unet", (4, 8), ((2, 1, 2),), plane)
    before, after = model_card(["a", "b", "c"], spec), model_card(["new", "c", "a"], spec)
    old, fresh = random_network(before, 1), random_network(after, 2)
    changed = random_network(after, 3)
    changed.load_state_dict(keep_channels(old.state_dict(), before.structures, fresh.state_dict(), after.structures))
    x = torch.randn(1, 1, 8, 8, 8)
    with torch.inference_mode():
        was, now = old(x), changed(x)
    torch.testing.assert_close(now[:, [0, 3, 2]], was[:, [0, 1, 3]])
    assert torch.equal(changed.head.weight[1], fresh.head.weight[1])
