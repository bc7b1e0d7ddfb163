from __future__ import annotations

import pytest

from devmon import DevmonError, Watch, every, log_spaced


def held(steps: object, last: int) -> list[int]:
    return [s for s in range(last + 1) if s in steps]  # type: ignore[operator]


def test_log_spaced_has_both_ends_and_step_0() -> None:
    chosen = held(log_spaced(50, 20_000), 30_000)
    assert chosen[0] == 0
    assert chosen[1] == 1
    assert chosen[-1] == 20_000
    late = [b / a for a, b in zip(chosen, chosen[1:], strict=False) if a > 500]
    assert max(late) / min(late) < 1.01  # evenly spaced in the logarithm


def test_unions_with_any_container() -> None:
    assert held(every(400) | {7, 50}, 1000) == [0, 7, 50, 400, 800]
    assert held(range(3) | every(500), 1000) == [0, 1, 2, 500, 1000]
    assert held(log_spaced(3, 100) | every(40, start=20, stop=60), 200) == [0, 1, 10, 20, 60, 100]


@pytest.mark.parametrize("wrong", [lambda: every(0), lambda: log_spaced(1, 10), lambda: log_spaced(5, 10, first=0),
                                   lambda: Watch("../x", print, every(1)), lambda: Watch("a", print, 100),
                                   lambda: Watch("a", 3, every(1))])  # fmt: skip
def test_bad_arguments_say_what_was_expected(wrong: object) -> None:
    with pytest.raises(DevmonError, match="need|made of letters"):
        wrong()  # type: ignore[operator]


def test_steps_of_a_file_of_settings_are_those_of_the_call() -> None:
    assert held(Watch("a", print, "every(5, start=2, stop=12)").steps, 20) == [2, 7, 12]  # type: ignore[arg-type]
    both = Watch("a", print, "log_spaced(3, 100) | every(40)").steps  # type: ignore[arg-type]
    assert held(both, 100) == held(log_spaced(3, 100) | every(40), 100)
    assert repr(both) == repr(log_spaced(3, 100) | every(40))  # what a run keeps of it


@pytest.mark.parametrize("text", ["", "100", "every", "every(x)", "often(3)", "every(3) |", "__import__('os').getcwd()",
                                  "every(1, 2, 3)", "[0, 2]"])  # fmt: skip
def test_other_text_is_refused_and_nothing_of_it_is_run(text: str) -> None:
    with pytest.raises(DevmonError, match=r"steps are written as every\(100\)"):
        Watch("a", print, text)  # type: ignore[arg-type]
