"""A tokenizer of few words, with what presets read of those of transformers."""

from __future__ import annotations

STEMS = [
    "walk",
    "talk",
    "look",
    "jump",
    "help",
    "open",
    "play",
    "turn",
    "call",
    "want",
    "need",
    "pass",
    "form",
    "plant",
    "add",
    "ask",
    "fill",
    "fix",
    "land",
    "last",
    "lift",
    "list",
    "mark",
    "mix",
    "pick",
    "print",
    "pull",
    "push",
]


class Words:
    """Special tokens first; then words after a space with their capital, plural and past forms; one id is missing."""

    bos_token_id, eos_token_id, pad_token_id = 1, 3, 2
    all_special_ids = (0, 1, 2, 3)

    def __init__(self) -> None:
        names = ["<unk>", "<s>", "<pad>", "</s>", ":", "\n", "to", "x"]
        for form in ("{}", "{}s", "{}ed"):
            names += ["Ġ" + form.format(stem) for stem in STEMS]
        names += ["Ġ" + stem.capitalize() for stem in STEMS]
        self.names = {name: i for i, name in enumerate(names)}
        self.hole = self.names.pop("x")

    def get_vocab(self) -> dict[str, int]:
        return dict(self.names)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [self.names[text]]
