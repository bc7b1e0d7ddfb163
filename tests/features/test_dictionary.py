"""Dictionaries in use: their maps by hand, the same function in other units, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from devmon.errors import DataError
from devmon.features import CrossLayer, Dictionary, Gate, Jump, Largest, Relu
from devmon.features.scaling import mean_norm_scale, rescaled, unit_rows, with_latents
from devmon.monitoring.fingerprint import identity


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dictionary(activation: object, d: int = 4, m: int = 7, out: int | None = None, **options: object) -> Dictionary:
    end = d if out is None else out
    parts = [normal(*shape, seed=i) for i, shape in enumerate(((d, m), (m,), (m, end), (end,)))]
    return Dictionary(*parts, activation=activation, centred=out is None, **options)  # type: ignore[arg-type]


def cross_layer(layers: int = 3, d: int = 2, m: int = 4) -> CrossLayer:
    shapes = ((layers, d, m), (layers, m), (layers * (layers + 1) // 2, m, d), (layers, d))
    return CrossLayer(*(normal(*shape, seed=i) for i, shape in enumerate(shapes)))


H = torch.tensor([[3.0, -1.0, 0.5, 2.0]])


@pytest.mark.parametrize(
    "activation, expected",
    [
        (Relu(), [3, 0, 0.5, 2]),
        (Largest(2), [3, 0, 0, 2]),
        (Largest(4), [3, 0, 0.5, 2]),  # what is negative stays out, k or not
        (Jump(torch.tensor([3.0, -2.0, 0.4, 0.0])), [0, 0, 0.5, 2]),  # above a threshold, not at it
        (Gate(torch.tensor([2.0, 2, 2, 0.5]), torch.tensor([1.0, 9, -2, 0])), [7, 0, 0, 1]),
    ],
)
def test_an_activation_by_hand(activation: object, expected: list[float]) -> None:
    assert activation(H).tolist() == [expected]  # type: ignore[operator]


def test_an_autoencoder_and_a_transcoder_by_hand() -> None:
    eye = torch.eye(2)
    weights = (2 * eye, torch.tensor([0.0, -1.0]), eye.flip(0), torch.tensor([1.0, 0.0]))
    x = torch.tensor([[3.0, 2.0]])
    assert Dictionary(*weights)(x).tolist() == [[4, 4]]  # f = (4, 3)
    assert Dictionary(*weights, centred=False)(x).tolist() == [[4, 6]]  # f = (6, 3)
    skip = Dictionary(*weights, centred=False, W_skip=torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    assert skip(x).tolist() == [[4, 9]]


def test_a_cross_layer_transcoder_writes_to_its_own_and_later_layers() -> None:
    coder, x = cross_layer(), normal(5, 6, seed=9)
    assert coder.pairs() == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
    f = [(x[:, 2 * at : 2 * at + 2] @ coder.W_enc[at] + coder.b_enc[at]).relu() for at in range(3)]
    for end in range(3):
        pairs = [(i, start) for i, (start, to) in enumerate(coder.pairs()) if to == end]
        expected = coder.b_dec[end] + sum(f[start] @ coder.W_dec[i] for i, start in pairs)
        torch.testing.assert_close(coder(x)[:, 2 * end : 2 * end + 2], expected)
    torch.testing.assert_close(coder.encode(x), torch.cat(f, 1))
    # a latent's length is that of all it writes; the last layer's writes only there
    torch.testing.assert_close(coder.norms()[8:], coder.W_dec[5].norm(dim=1))
    torch.testing.assert_close(coder.norms()[:4], coder.W_dec[:3].square().sum((0, 2)).sqrt())
    torch.testing.assert_close(coder(x.view(5, 1, 6)), coder(x).view(5, 1, 6))


CODERS = {
    "relu": dictionary(Relu()),
    "jump": dictionary(Jump(0.3 * torch.ones(7, dtype=torch.float64))),
    "gate": dictionary(Gate(normal(7, seed=5).abs(), normal(7, seed=6))),
    "transcoder": dictionary(Relu(), out=3, W_skip=normal(4, 3, seed=7)),
    "crosscoder": dictionary(Relu(), parts=2),
    "cross-layer": cross_layer(),
}


@pytest.mark.parametrize("name", CODERS)
def test_other_units_are_the_same_function(name: str) -> None:
    coder = CODERS[name]
    x = normal(20, coder.inputs, seed=11)
    scale = 1 + normal(coder.parts, seed=12).abs()
    out = scale if getattr(coder, "centred", False) else 1 + normal(coder.parts, seed=13).abs()
    each, each_out = scale.repeat_interleave(x.shape[1] // len(scale)), out.repeat_interleave(coder.outputs // len(out))
    torch.testing.assert_close(rescaled(coder, scale, out)(x), coder(x * each) / each_out)
    by = 1 + normal(coder.latents, seed=14).abs()
    torch.testing.assert_close(with_latents(coder, by)(x), coder(x))
    torch.testing.assert_close(with_latents(coder, by).encode(x), coder.encode(x) * by)
    torch.testing.assert_close(unit_rows(coder).norms(), torch.ones_like(by))
    torch.testing.assert_close(unit_rows(coder)(x), coder(x))


def test_a_latent_that_writes_nothing_stays_finite() -> None:
    silent = dictionary(Relu())
    silent.W_dec[2] = 0
    assert torch.isfinite(unit_rows(silent)(normal(3, 4))).all()


def test_the_scale_is_that_of_each_part() -> None:
    x = normal(50, 6)
    scale = mean_norm_scale(torch.cat([x[:, :3], 10 * x[:, :3]], 1), 2)
    torch.testing.assert_close(scale[0], 10 * scale[1])
    torch.testing.assert_close((scale[0] * x[:, :3]).norm(dim=1).mean(), torch.tensor(3**0.5, dtype=torch.float64))


def test_a_crosscoder_counts_the_lengths_of_its_parts() -> None:
    coder = dictionary(Relu(), parts=2)
    torch.testing.assert_close(coder.norms(), coder.W_dec[:, :2].norm(dim=1) + coder.W_dec[:, 2:].norm(dim=1))


def test_chosen_latents_do_what_they_did() -> None:
    x, coder = normal(9, 4), CODERS["jump"]
    assert isinstance(coder, Dictionary)
    torch.testing.assert_close(coder.chosen([5, 2]).encode(x), coder.encode(x)[:, [5, 2]])


def test_the_identity_of_an_instrument_knows_every_number_of_a_dictionary() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Holder:
        dictionary: Dictionary

    def print_of(coder: Dictionary) -> str:
        return identity(Holder(coder))["fingerprint"]

    jump = torch.full((7,), 0.3, dtype=torch.float64)
    one, same = dictionary(Jump(jump)), dictionary(Jump(jump.clone()))
    assert one == same
    assert print_of(one) == print_of(same)
    other = jump.clone()
    other[6] += 1e-9
    assert print_of(dictionary(Jump(other))) != print_of(one)
    assert print_of(dictionary(Relu())) != print_of(one)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"b_enc": torch.zeros(6)}, "b_enc is (7,); got (6,)"),
        ({"W_dec": torch.zeros(7, 5)}, "4 inputs and 5 outputs"),
        ({"parts": 3}, "in 3 parts"),
        ({"activation": Largest(8)}, "1 to the number of latents, 7; got 8"),
        ({"activation": Largest(0)}, "got 0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], words: str) -> None:
    fields = {"W_enc": torch.zeros(4, 7), "b_enc": torch.zeros(7), "W_dec": torch.zeros(7, 4), "b_dec": torch.zeros(4)}
    if "W_dec" in change:
        change |= {"b_dec": torch.zeros(5)}
    with pytest.raises(DataError) as error:
        Dictionary(**fields | change)  # type: ignore[arg-type]
    assert words in str(error.value)


def test_a_skip_needs_its_input() -> None:
    coder = CODERS["transcoder"]
    with pytest.raises(DataError, match="decode\\(f, x\\)"):
        coder.decode(coder.encode(normal(2, 4)))
