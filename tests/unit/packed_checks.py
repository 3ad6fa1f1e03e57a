"""What every packed transformer must do: like diffusers, and bitwise independent of the rest of the batch."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from tests.unit.adapter_checks import assert_independent, assert_like_merged

GRIDS = [(1, 1), (2, 3), (4, 4), (8, 8), (5, 7), (12, 12), (16, 19)]  # image tokens: 1 to 304, so both CPU kernels
TEXT_LENGTHS = [1, 1, 3, 5, 16, 17, 40]

# One sequence: what diffusers' forward takes for a batch of one.
Arguments = dict[str, Any]


class PackedChecks:
    """The tests; a family's class says how its models and sequences are made, and in `pack` how they are packed.

    Fixtures of the family: `models`, (diffusers' transformer, ours over the same weights).

    Attributes:
        changeable: arguments of a sequence that its own prediction must depend on.
        hooked: paths of linear layers that adapters may wrap.
    """

    changeable: tuple[str, ...] = ()
    hooked: tuple[str, ...] = ()

    def make_sequence(self, grid: tuple[int, int], text_length: int) -> Arguments:
        """A random sequence."""
        raise NotImplementedError

    def pack(self, sequences: list[Arguments]) -> Arguments:
        """The arguments of the packed forward."""
        raise NotImplementedError

    def unpack(self, prediction: torch.Tensor, sequences: list[Arguments]) -> list[torch.Tensor]:
        """The predictions, each laid out as diffusers' forward returns it."""
        raise NotImplementedError

    def draw(self, count, seed):
        torch.manual_seed(seed)
        choose = random.Random(seed)
        return [self.make_sequence(choose.choice(GRIDS), choose.choice(TEXT_LENGTHS)) for _ in range(count)]

    def forward(self, model, sequences):
        return self.unpack(model(**self.pack(sequences), return_dict=False)[0], sequences)

    @torch.inference_mode()
    def test_like_diffusers(self, models):
        reference, packed = models
        sequences = self.draw(20, seed=0)
        for sequence, prediction in zip(sequences, self.forward(packed, sequences), strict=True):
            expected = reference(**sequence)[0]
            assert expected.std() > 0.1
            torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-5)

    @torch.inference_mode()
    def test_bits_do_not_depend_on_the_batch(self, models):
        _, packed = models
        pool = self.draw(24, seed=1)
        alone = [self.forward(packed, [sequence])[0] for sequence in pool]
        choose = random.Random(2)
        for _ in range(25):
            members = choose.sample(range(len(pool)), choose.choice([2, 3, 5, 8, 17]))
            together = self.forward(packed, [pool[i] for i in members])
            assert all(torch.equal(together[k], alone[i]) for k, i in enumerate(members)), members

    @torch.inference_mode()
    def test_bits_do_not_depend_on_equal_neighbours(self, models):
        """Runs of equal lengths take one attention call; it must give the bits of many."""
        _, packed = models
        for height, width, text in [(8, 8, 5), (4, 4, 1), (5, 7, 16), (16, 19, 3)]:
            torch.manual_seed(height)
            run = [self.make_sequence((height, width), text) for _ in range(8)]
            for sequence, prediction in zip(run, self.forward(packed, run), strict=True):
                assert torch.equal(prediction, self.forward(packed, [sequence])[0])

    @torch.inference_mode()
    def test_a_changed_neighbour_changes_nothing_else(self, models):
        """Sequences that leaked into each other would show here, where an input of a neighbour is replaced."""
        _, packed = models
        before = self.draw(5, seed=3)
        for field in self.changeable:
            after = copy.copy(before)
            after[2] = before[2] | {field: torch.rand_like(before[2][field])}
            pairs = zip(self.forward(packed, before), self.forward(packed, after), strict=True)
            assert [torch.equal(old, new) for old, new in pairs] == [True, True, False, True, True], field

    @torch.inference_mode()
    def test_no_argument_is_changed(self, models):
        """The forward works in place: never on the caller's tensors, not even where no padding makes a copy of them."""
        _, packed = models
        arguments = self.pack([self.make_sequence((4, 4), 16)])
        given = copy.deepcopy(arguments)
        packed(**arguments)
        torch.testing.assert_close(arguments, given, rtol=0, atol=0)

    @torch.inference_mode()
    def test_a_layer_with_a_hook_is_called(self, models):
        """What stands in for a linear layer must not bypass an adapter on it."""
        _, packed = models
        sequences = self.draw(2, seed=10)
        before = self.forward(packed, sequences)
        for path in self.hooked:
            layer = packed.get_submodule(path)
            hook = layer.register_forward_hook(lambda module, args, output: output * 1.5)
            assert not torch.equal(self.forward(packed, sequences)[0], before[0]), path
            hook.remove()
        assert torch.equal(self.forward(packed, sequences)[0], before[0])

    @torch.inference_mode()
    @pytest.mark.parametrize("modulating", [False, True])
    def test_adapters(self, models, modulating):
        reference, packed = models
        sequences = self.draw(6, seed=11)
        assert_like_merged(reference, packed, sequences, self.forward, lambda model, s: model(**s)[0], modulating)
        assert_independent(packed, sequences, self.forward, modulating)

    @torch.inference_mode()
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_like_diffusers(self, models, dtype):
        reference, packed = (copy.deepcopy(model).to(dtype) for model in models)
        for sequence in self.draw(5, seed=6):
            sequence = {name: value if name.endswith("_ids") else value.to(dtype) for name, value in sequence.items()}
            # A value's last bit is a matter of the order of additions: with half the bits it is this large.
            torch.testing.assert_close(self.forward(packed, [sequence])[0], reference(**sequence)[0], rtol=0, atol=0.06)

    @torch.inference_mode()
    def test_layouts_of_a_running_set_are_made_once(self, models):
        _, packed = models
        packed._layouts.clear()
        sequences, made = self.draw(34, seed=7), []
        packs = [self.pack(sequences[first : first + 2]) for first in range(33)]
        for _ in range(2):
            made.append([])
            for pack in packs:
                packed(**pack)
                made[-1].append(next(reversed(packed._layouts._entries.values())))
        assert all(first is second for first, second in zip(*made, strict=True))


class PackedIdsChecks(PackedChecks):
    """For families whose positions are given as ids."""

    def pack(self, sequences):
        streams, ids = ("hidden_states", "encoder_hidden_states"), ("img_ids", "txt_ids")
        return {
            name: [s[name] for s in sequences]
            if name in ids
            else torch.cat([s[name] for s in sequences], dim=int(name in streams))
            for name in sequences[0]
        }

    def unpack(self, prediction, sequences):
        return list(prediction.split([s["hidden_states"].shape[1] for s in sequences], dim=1))

    @torch.inference_mode()
    def test_ids_change_the_prediction(self, models):
        _, packed = models
        sequence = self.make_sequence((4, 4), 5)
        for name in ("img_ids", "txt_ids"):
            moved = sequence | {name: sequence[name] + torch.arange(len(sequence[name]))[:, None]}
            assert not torch.equal(self.forward(packed, [moved])[0], self.forward(packed, [sequence])[0])

    @torch.inference_mode()
    def test_rows_that_do_not_fit_are_refused(self, models):
        _, packed = models
        arguments = self.pack([self.make_sequence((2, 2), 3)])
        with pytest.raises(ValueError, match=r"hidden_states has 5 rows.*\[4\] have 4"):
            packed(**arguments | {"hidden_states": torch.randn(1, 5, 16)})
        with pytest.raises(ValueError, match=r"encoder_hidden_states has 4 rows.*\[3\] have 3"):
            packed(**arguments | {"encoder_hidden_states": torch.randn(1, 4, 48)})
        with pytest.raises(ValueError, match="img_ids has 2 entries for 1 timesteps"):
            packed(**arguments | {"img_ids": arguments["img_ids"] * 2})


def image_ids(grid: tuple[int, int], modality: int = 0, start: int = 0) -> torch.Tensor:
    """Positions (modality, row, column) of an image's tokens, [tokens, 3]."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([torch.full_like(rows, modality), rows + start, columns + start], dim=-1).view(-1, 3).float()
