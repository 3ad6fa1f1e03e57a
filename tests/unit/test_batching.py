"""Continuous batching, played with ranks that do what plans say: each branch once a step, budgets kept, no starving.

`PlayedRanks` carries out plans as the workers do, and fails the test wherever a plan asks for what can't be done.
"""

from collections import Counter, defaultdict

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.toy_pipeline import toy_request
from vllm_cfg_plugin.engine.admission import LOOK_AHEAD, MAX_OVERTAKEN
from vllm_cfg_plugin.engine.batching import StepBatch
from vllm_cfg_plugin.engine.cost import UNCALIBRATED
from vllm_cfg_plugin.engine.plan import DECODED, FORWARDED, PREVIEWED, SideReport, StepPlan
from vllm_cfg_plugin.engine.step_result import StepResult
from vllm_cfg_plugin.params import LoRA, StepCache


class PlayedRanks:
    """`ranks` ranks; side reports come `delay` plans late, those of long forwards `long_delay`."""

    def __init__(self, ranks, delay=0, long_delay=3):
        self.ranks = ranks
        self.delay = delay
        self.long_delay = long_delay
        self.requests = {}
        self.held = defaultdict(set)  # (id, branch) -> ranks
        self.owners = {}  # of running requests
        self.steps = Counter()
        self.forwarding = {}  # long request -> ranks that have not reported its forwards
        self.late = []  # (plans still to pass, report)
        self.previewed = []  # (id, steps taken)
        self.worked = []  # per step: tokens of each rank

    def run(self, plan):
        for id in plan.retire:
            self.requests.pop(id, None)
            self.owners.pop(id, None)
            self.forwarding.pop(id, None)
            self._cancel_previews(id)
        for admission in plan.admit:
            assert admission.id not in self.requests
            self.requests[admission.id] = admission.request
        for encode in plan.encodes:
            assert encode.id in self.requests
            self.late.append((self.delay, SideReport(encode.id, encode.branch, encode.rank, 1.0)))
        for assign in plan.assign:
            self.owners[assign.id] = assign.owners
            if assign.owners is None:  # it sits steps out
                del self.owners[assign.id]
        if plan.advance:
            self._step()
        for id in plan.long_steps:
            assert self.forwarding.pop(id) == set(), "a step needs the predictions of all ranks"
            self.steps[id] += 1
        for forward in plan.forwards:
            self._forward(forward)
        for preview in plan.previews:
            assert 0 < self.steps[preview.id] < self.requests[preview.id].num_inference_steps
            self.previewed.append((preview.id, self.steps[preview.id]))
            self.late.append((self.delay, SideReport(preview.id, PREVIEWED, preview.rank, 1.0)))
        for decode in plan.decodes:
            self._cancel_previews(decode.id)
            request = self.requests.pop(decode.id)
            assert decode.id not in self.forwarding
            assert self.steps[decode.id] == request.num_inference_steps
            assert 0 <= decode.rank < self.ranks
            self.late.append((self.delay, SideReport(decode.id, DECODED, decode.rank, 1.0, "", (1, 2, 2, 3))))
        due = [report for wait, report in self.late if wait == 0]
        self.late = [(wait - 1, report) for wait, report in self.late if wait]
        for report in due:
            if report.branch == FORWARDED:
                self.forwarding.get(report.id, set()).discard(report.rank)
            elif report.branch >= 0:
                self.held[report.id, report.branch].add(report.rank)
        return StepResult(side=[(report, None) for report in due])

    def _cancel_previews(self, id):
        self.late = [(wait, report) for wait, report in self.late if (report.id, report.branch) != (id, PREVIEWED)]

    def _forward(self, forward):
        """A long request's forwards begin."""
        request = self.requests[forward.id]
        assert forward.id not in self.owners
        assert forward.id not in self.forwarding, "one step at a time"
        assert len(forward.owners) == request.branches_at(self.steps[forward.id])
        for branch, owner in enumerate(forward.owners):
            assert owner in self.held[forward.id, branch]
        ranks = set(forward.owners)
        assert not any(ranks & busy for busy in self.forwarding.values()), "a rank has one long forward at a time"
        self.forwarding[forward.id] = ranks
        self.late += [(self.long_delay, SideReport(forward.id, FORWARDED, rank, 1.0)) for rank in sorted(ranks)]

    def _step(self):
        tokens = [0] * self.ranks
        for id, owners in list(self.owners.items()):
            request = self.requests[id]
            assert len(owners) == request.branches_at(self.steps[id]), "each branch of this step has exactly one owner"
            for branch, owner in enumerate(owners):
                assert owner in self.held[id, branch], "no rank forwards a branch whose text it does not hold"
                tokens[owner] += request.image_tokens + request.text_tokens[branch]
            self.steps[id] += 1
            if self.steps[id] == request.num_inference_steps:
                del self.owners[id]
        self.worked.append(tokens)


def run_plan(batch, ranks):
    """Plan a step, have the ranks carry it out and note their reports: what was planned, and the requests decoded."""
    planned = batch.next_plan()
    result = ranks.run(planned.plan)
    batch.note_result(planned, result)
    noted = [(report, batch.note_side_report(report)) for report, _ in result.side]
    return planned, [request for report, request in noted if report.branch == DECODED]


def play(batch, ranks, arrivals, is_long=None, steps=2000):
    """Requests arrive at their plan number; returns (the ids in order of admission, in order of their end).

    Args:
        is_long: filled with whether each one is.
    """
    admitted, ended = [], []
    arrivals = list(arrivals)
    for step in range(steps):
        for _, spec in [arrival for arrival in arrivals if arrival[0] <= step]:
            request = batch.add(f"request-{len(batch.all_requests())}-{step}-{id(spec)}", 0, spec)
            (is_long if is_long is not None else {})[request.id] = request.is_long
        arrivals = [arrival for arrival in arrivals if arrival[0] > step]
        planned, decoded = run_plan(batch, ranks)
        admitted += [request.id for request in planned.admitted]
        for request in decoded:
            batch.finish(request)
            ended.append(request.id)
        if not arrivals and not len(batch):
            return admitted, ended
    raise AssertionError("requests are left after so many steps: somebody starves")


def quarters(start, stop):
    """An interval of guidance; the whole where that would be none."""
    return (start / 4, stop / 4) if start < stop else (0.0, 1.0)


specs = st.builds(
    lambda further, interval, tokens, steps, prompt, previews, cache: msgspec.structs.replace(
        toy_request(prompt=prompt, negative=[""] * further, steps=steps, image_tokens=tokens, interval=interval),
        previews=previews,
        cache=cache,
    ),
    st.integers(0, 3),
    st.builds(quarters, st.integers(0, 4), st.integers(0, 4)),
    st.integers(1, 300),
    st.integers(1, 12),
    st.sampled_from(["a", "a cat", "a very long prompt that goes on"]),
    st.sampled_from([0, 0, 3]),
    st.sampled_from([None, StepCache(), StepCache(interval=3, range=(0.2, 0.9)), StepCache(negative_only=True)]),
)
traces = st.lists(st.tuples(st.integers(0, 20), specs), min_size=1, max_size=14)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(trace=traces, ranks=st.integers(1, 5), delay=st.integers(0, 3), budget=st.integers(50, 1000))
def test_each_request_takes_each_step_once_and_ends(trace, ranks, delay, budget):
    """Every request takes each step once on ranks that can and ends."""
    batch = StepBatch(ranks, 6, budget, UNCALIBRATED)
    played = PlayedRanks(ranks, delay)
    admitted, ended = play(batch, played, trace)
    assert sorted(admitted) == sorted(ended) == list(range(len(trace)))
    assert not played.requests
    assert not batch.awaits_side_work
    for tokens in played.worked:
        assert max(tokens) <= budget, "those that are larger by themselves forward beside the steps"


@settings(deadline=None, derandomize=True, max_examples=100)
@given(trace=traces, budget=st.integers(50, 600))
def test_no_request_is_overtaken_more_often_than_the_bound(trace, budget):
    batch, is_long = StepBatch(2, 6, budget, UNCALIBRATED), {}
    admitted, _ = play(batch, PlayedRanks(2), trace, is_long)
    for kind in (False, True):  # long ones wait for something else than the others
        line = [id for id in admitted if is_long[id] == kind]
        for place, id in enumerate(line):
            assert sum(other > id for other in line[:place]) <= MAX_OVERTAKEN


def test_the_same_arrivals_make_the_same_plans():
    def plans():
        batch, ranks = StepBatch(3, 8, 500, UNCALIBRATED), PlayedRanks(3, 1)
        for i in range(9):
            batch.add(str(i), 0, toy_request(negative=None if i % 3 else "", steps=2 + i % 4, image_tokens=20 + 7 * i))
        return [run_plan(batch, ranks)[0].plan for _ in range(30)]

    assert plans() == plans()


def test_a_large_request_blocks_nobody_and_is_not_starved():
    """A large request at the head blocks nobody and is not starved."""
    batch, ranks = StepBatch(1, 100, 100, UNCALIBRATED), PlayedRanks(1)
    small = [(step, toy_request("x", None, steps=4 + step % 3, image_tokens=40)) for step in range(60)]
    large = (5, toy_request("x", None, steps=2, image_tokens=90))
    admitted, _ = play(batch, ranks, sorted([*small, large], key=lambda arrival: arrival[0]))
    id = 6  # two small ones at most fit beside each other, and none beside the large one
    overtook = [other for other in admitted[: admitted.index(id)] if other > id]
    assert len(overtook) == MAX_OVERTAKEN, "small ones go past it while it does not fit, and then no more"


def test_a_request_waits_while_others_carry_as_many_adapters_as_may_be():
    batch, ranks = StepBatch(2, 8, 10**6, UNCALIBRATED, max_adapters=2), PlayedRanks(2)

    def carrying(*names, steps=3):
        loras = [LoRA(name, f"/{name}", f"key of {name}") for name in names]
        return msgspec.structs.replace(toy_request(steps=steps), lora=loras)

    for names in (("a",), ("a", "b"), ("c",), ("b",), ()):
        batch.add("".join(names), 0, carrying(*names))
    assert sorted(request.request_id for request in run_plan(batch, ranks)[0].admitted) == ["", "a", "ab", "b"]
    assert play(batch, ranks, []) == ([2], [0, 1, 3, 4, 2]), "and joins when they are done"


def test_a_steady_batch_has_plans_without_any_change():
    batch, ranks = StepBatch(2, 300, 10**6, UNCALIBRATED), PlayedRanks(2)
    for i in range(256):
        batch.add(str(i), 0, toy_request(steps=50))
    while len(batch.stepping.running) < 256:
        run_plan(batch, ranks)
    plan = batch.next_plan().plan
    assert plan == StepPlan(plan.step, [], [], [], [], True, [])


@pytest.mark.parametrize(("ranks", "guided", "busy"), [(4, 1, 2), (4, 8, 4), (2, 1, 2), (3, 3, 3)])
def test_as_many_ranks_work_as_there_are_branches_to_share(ranks, guided, busy):
    batch, played = StepBatch(ranks, 32, 10**6, UNCALIBRATED), PlayedRanks(ranks)
    play(batch, played, [(0, toy_request(steps=4)) for _ in range(guided)])
    assert all(sum(tokens > 0 for tokens in step) == busy for step in played.worked)


def test_work_is_shared_with_a_dry_rank_if_that_pays():
    """Two short requests on rank 1 leave; one of the two long ones on rank 0 is encoded on rank 1, and moves there."""
    batch, played = StepBatch(2, 8, 10**6, UNCALIBRATED), PlayedRanks(2)
    trace = [(0, toy_request("long", None, steps=s, image_tokens=100)) for s in (60, 3, 60, 3)]
    play(batch, played, trace)
    lopsided = [tokens for tokens in played.worked[:58] if min(tokens) == 0]
    assert len(lopsided) <= 2, "the steps until the text is encoded there"


def test_outside_the_guidance_interval_the_free_rank_helps():
    """Outside the guidance interval the freed rank takes over positive branches."""
    batch, played = StepBatch(2, 8, 10**6, UNCALIBRATED), PlayedRanks(2)
    spec = toy_request(steps=40, image_tokens=100, interval=(0.0, 0.5))
    play(batch, played, [(0, spec), (0, spec)])
    assert [sum(tokens) for tokens in played.worked] == [4 * 100 + 2 * 5] * 20 + [2 * 100 + 2 * 5] * 20
    lopsided = [tokens for tokens in played.worked if max(tokens) > 1.1 * min(tokens)]
    assert len(lopsided) <= 2, "the steps until a positive text is encoded there"


def test_a_guidance_interval_costs_two_changes_of_plan():
    """A guidance interval costs two changes of plan and the negative branch keeps its rank."""
    batch, played = StepBatch(2, 8, 10**6, UNCALIBRATED), PlayedRanks(2)
    batch.add("one", 0, toy_request(steps=8, interval=(0.25, 0.75)))
    assigned = []
    while len(batch.stepping.running) + len(batch.stepping.preparing) + len(batch.waiting):
        step = played.steps[0]
        assigned += [(step, assign.owners) for assign in run_plan(batch, played)[0].plan.assign]
    assert assigned == [(0, (0,)), (2, (0, 1)), (6, (0,))]


def test_requests_that_are_taken_out_anywhere_leave_no_trace():
    batch, ranks = StepBatch(2, 2, 10**6, UNCALIBRATED), PlayedRanks(2, delay=2)
    requests = [batch.add(str(i), 0, toy_request(steps=2)) for i in range(4)]
    for _ in range(4):
        run_plan(batch, ranks)
    assert batch.stepping.running or batch.draining
    assert batch.waiting
    for request in requests:
        batch.take_out(request)
    assert sorted(batch.next_plan().plan.retire) == [0, 1], "the ranks never heard of the others"
    assert not batch.awaits_side_work
    assert len(batch) == 0
    assert batch.next_plan().plan.is_empty()


def test_more_join_than_one_look_at_the_line_sees():
    """More requests than one look at the line join while there is room."""
    batch = StepBatch(2, max_requests=LOOK_AHEAD + 8, max_tokens=10**6, cost=UNCALIBRATED)
    for n in range(LOOK_AHEAD + 8):
        batch.add(str(n), 0, toy_request(seed=n))
    assert [len(batch.next_plan().admitted) for _ in range(3)] == [LOOK_AHEAD, 8, 0]


def test_an_idle_batch_starts_with_who_is_being_encoded():
    """An idle batch starts with all whose texts are being encoded and waits for no later one."""
    batch = StepBatch(1, 8, 10**6, UNCALIBRATED)
    for n in range(3):
        batch.add(str(n), 0, toy_request(negative=None))
    batch.note_result(batch.next_plan(), StepResult())
    batch.note_side_report(SideReport(0, 0, 0, 1.0))
    assert not batch.next_plan().plan.advance
    batch.add("late", 0, toy_request(negative=None))
    batch.note_side_report(SideReport(1, 0, 0, 1.0))
    late = batch.next_plan()
    assert not late.plan.advance
    batch.note_result(late, StepResult())
    batch.take_out(batch.named("2"))
    assert [request.id for request in batch.next_plan().running] == [0, 1]
    batch.note_side_report(SideReport(3, 0, 0, 1.0))
    assert [request.id for request in batch.next_plan().running] == [0, 1, 3], "a batch that runs waits for nobody"


def test_a_request_takes_no_step_before_all_ranks_have_its_noise():
    batch = StepBatch(2, 8, 10**6, UNCALIBRATED)
    request = batch.add("early", 0, toy_request(negative=None))
    admitting = batch.next_plan()
    batch.note_side_report(SideReport(0, 0, 0, 1.0))  # a cached text is encoded before the slowest rank has its noise
    assert not batch.next_plan().plan.advance
    batch.note_result(admitting, StepResult(failed={0: "no noise"}))
    assert not batch.next_plan().plan.assign, "no rank may wait for one that knows no shape to exchange"
    batch.take_out(request)
    assert batch.next_plan().plan.retire == [0]


def finish_all(batch, ranks, steps=200):
    """Play until everybody is done; returns the ids in the order in which they end."""
    ended = []
    for _ in range(steps):
        for request in run_plan(batch, ranks)[1]:
            batch.finish(request)
            ended.append(request.id)
        if not len(batch):
            return ended
    raise AssertionError("requests are left after so many steps")


@settings(deadline=None, derandomize=True, max_examples=150)
@given(trace=traces, ranks=st.integers(1, 4), delay=st.integers(0, 3), deaths=st.lists(st.integers(0, 40), max_size=4))
def test_new_ranks_take_all_steps_of_all_requests(trace, ranks, delay, deaths):
    """Whenever ranks start anew all requests take all their steps on the new ones."""
    batch = StepBatch(ranks, 6, 500, UNCALIBRATED)
    played, ended = PlayedRanks(ranks, delay), []
    for number, (_, spec) in enumerate(trace):
        batch.add(str(number), 0, spec)
    for step in range(max(deaths, default=0) + 1):
        if step in deaths:
            assert batch.start_over(has_killed=False) == []
            assert not batch.awaits_side_work
            played = PlayedRanks(ranks, delay)  # which know nothing, and fail the test if they are asked for more
        for request in run_plan(batch, played)[1]:
            batch.finish(request)
            ended.append(request.id)
    ended += finish_all(batch, played) if len(batch) else []
    assert sorted(ended) == list(range(len(trace)))
    assert not played.requests


def test_what_the_ranks_knew_waits_first_in_its_old_order():
    """What the ranks knew waits before all others in its old order."""
    batch, ranks = StepBatch(2, 2, 10**6, UNCALIBRATED), PlayedRanks(2)
    for number in range(4):
        batch.add(str(number), 0, toy_request(steps=5))
    for _ in range(3):
        run_plan(batch, ranks)
    aborted = batch.named("0")
    batch.take_out(aborted)
    run_plan(batch, ranks)
    batch.take_out(batch.named("1"))
    batch.start_over(has_killed=True)
    plan = batch.next_plan().plan
    assert [admission.id for admission in plan.admit] == [2, 3]
    assert plan.retire == [], "the new ranks never heard of what was aborted"
    assert [len(batch.named(name).lone_deaths) for name in "23"] == [1, 0], "who waited has killed nobody"


def test_suspects_are_tried_one_at_a_time_and_the_killer_is_named():
    """Ranks died of three requests twice, so each joins when those before it are past the steps where that was."""
    batch = StepBatch(2, 8, 10**6, UNCALIBRATED)
    for number in range(3):
        batch.add(str(number), 0, toy_request(steps=5))
    for _ in range(2):
        assert len(batch.next_plan().admitted) == 3
        assert not batch.is_trial
        assert batch.start_over(has_killed=True) == []
    batch.add("later", 0, toy_request(steps=5))
    ended = []
    for killers in ([], [], [1]):  # the first times may be accidents
        ranks = PlayedRanks(2)
        while 1 not in batch.stepping.preparing:
            for request in run_plan(batch, ranks)[1]:
                batch.finish(request)
                ended.append(request.id)
            known = [request for id in ranks.requests if (request := batch.known(id)) is not None]
            assert sum(not request.is_cleared for request in known) <= 1
            assert 3 not in ranks.requests
        assert batch.is_trial
        assert [request.id for request in batch.start_over(has_killed=True)] == killers
    batch.take_out(batch.named("1"))
    assert sorted(ended + finish_all(batch, PlayedRanks(2))) == [0, 2, 3]


def run_until(batch, request, steps):
    ranks = PlayedRanks(2)
    while request.done_steps < steps or batch.known(request.id) is None:
        run_plan(batch, ranks)
    return ranks


@pytest.mark.parametrize(
    ("steps_done", "deaths_until_it_fails"),
    [([7] * 9, 3), ([0, 9, 1, 0, 0], 5), ([8, 6, 3, 0, 5], 5), ([0, 0, 8, 8, 18, 18], None)],
)
def test_only_deaths_at_one_step_convict_a_request_soon(steps_done, deaths_until_it_fails):
    batch = StepBatch(2, 8, 10**6, UNCALIBRATED)
    request = batch.add("a", 0, toy_request(steps=20))
    convicted_at = None
    for number, steps in enumerate(steps_done, start=1):
        run_until(batch, request, steps)
        if batch.start_over(has_killed=True):
            convicted_at = number
            break
    assert convicted_at == deaths_until_it_fails


def test_nobody_waits_for_a_suspect_that_is_past_where_ranks_died():
    batch = StepBatch(2, 8, 10**6, UNCALIBRATED)
    suspect = batch.add("suspect", 0, toy_request(steps=50))
    for _ in range(2):
        run_until(batch, suspect, steps=3)
        batch.start_over(has_killed=True)
    other = batch.add("other", 0, toy_request(steps=2))
    ranks = run_until(batch, suspect, steps=4)
    assert batch.is_trial
    assert batch.known(other.id) is None
    while batch.named("other"):
        turn(batch, ranks)
    assert suspect.done_steps < 15
    assert not batch.is_trial


# ---- long requests: their forwards run beside the steps ----

LONG = 500  # image tokens, above every budget below


def turn(batch, ranks):
    """Plan a step, have it carried out and answer whose images are there; what was planned."""
    planned, decoded = run_plan(batch, ranks)
    for request in decoded:
        batch.finish(request)
    return planned


def long_batch(ranks=2, **limits):
    return StepBatch(ranks, limits.pop("max_requests", 8), limits.pop("max_tokens", 10**6), UNCALIBRATED, **limits)


@pytest.mark.parametrize("limits", [{"max_tokens": 300}, {"max_step_us": 300.0}])
@pytest.mark.parametrize("negative", ["", None])
def test_nobody_waits_for_a_long_request(limits, negative):
    """A long request is forwarded beside the steps and nobody waits for it."""
    batch, ranks = long_batch(**limits), PlayedRanks(2, long_delay=40)
    long = batch.add("long", 0, toy_request("a", negative, steps=3, image_tokens=LONG))
    small = batch.add("small", 0, toy_request("a", steps=20))
    assert (long.is_long, small.is_long) == (True, False)
    advanced = []
    while batch.named("small"):
        advanced.append(turn(batch, ranks).plan.advance)
    assert sum(advanced) == 20
    assert all(advanced[1:21]), "one step a plan"
    assert (ranks.steps[long.id], ranks.steps[small.id]) == (0, 20)
    while len(batch):
        turn(batch, ranks)
    assert (ranks.steps[long.id], long.done_steps) == (3, 3)
    assert not batch.awaits_side_work


def forwards_of(batch, ranks, plans=200):
    """Play to the end: the owners that each long request's forwards were given, in order."""
    owners = defaultdict(list)
    for _ in range(plans):
        for forward in turn(batch, ranks).plan.forwards:
            owners[forward.id].append(forward.owners)
    assert not len(batch)
    return owners


def test_an_interval_changes_a_long_requests_branches():
    """Guidance in an interval changes which branches a long request forwards."""
    batch = long_batch(max_tokens=300)
    batch.add("long", 0, toy_request(steps=4, image_tokens=LONG, interval=(0.25, 0.75)))
    assert forwards_of(batch, PlayedRanks(2)) == {0: [(0,), (0, 1), (0, 1), (0,)]}


def test_one_rank_forwards_both_long_branches_in_one_piece():
    """One rank forwards both branches of a long request in one piece of work."""
    batch, ranks = long_batch(1, max_tokens=300), PlayedRanks(1)
    batch.add("long", 0, toy_request(steps=2, image_tokens=LONG))
    assert forwards_of(batch, ranks) == {0: [(0, 0), (0, 0)]}


def test_a_rank_has_one_long_request_at_a_time():
    batch, ranks = long_batch(max_tokens=300), PlayedRanks(2)
    for name in "abc":
        batch.add(name, 0, toy_request(name, None, steps=5, image_tokens=LONG))
    for _ in range(3):
        run_plan(batch, ranks)
    assert sorted(request.owners for request in batch.stepping.beside.values()) == [(0,), (1,)]
    assert len(batch.waiting) == 1
    assert {id: len(owners) for id, owners in forwards_of(batch, ranks).items()}[2] == 5


def test_a_small_request_goes_to_the_rank_without_a_long_one():
    batch = long_batch(max_tokens=300)
    batch.add("long", 0, toy_request("a", None, image_tokens=LONG))
    batch.add("small", 0, toy_request("b", None))
    assert [request.owners for request in batch.next_plan().admitted] == [(0,), (1,)]


def test_waiting_long_requests_keep_no_small_ones_out():
    """Long requests that wait for a rank keep no small ones out."""
    batch, ranks = long_batch(max_tokens=300, max_requests=100), PlayedRanks(2, long_delay=10**6)
    for n in range(LOOK_AHEAD + 2):
        batch.add(f"long {n}", 0, toy_request(steps=5, image_tokens=LONG))
    for n in range(3 * MAX_OVERTAKEN):
        batch.add(f"small {n}", 0, toy_request(steps=1))
    for _ in range(20):
        turn(batch, ranks)
    assert len(batch) == LOOK_AHEAD + 2


def test_long_requests_hold_at_most_half_of_the_places():
    """Here those whose decodes never end."""
    batch, ranks = long_batch(max_tokens=300, max_requests=4), PlayedRanks(2, long_delay=0)
    for name in "abcd":
        batch.add(name, 0, toy_request(steps=1, image_tokens=LONG))
    for _ in range(20):
        run_plan(batch, ranks)  # whose images are dropped: nobody tells the batch of them
    assert sorted(batch.draining) == [0, 1]
    batch.add("small", 0, toy_request(steps=1))
    assert [request.request_id for request in batch.next_plan().admitted] == ["small"]


@pytest.mark.parametrize("plans", range(9))
def test_a_long_request_that_is_taken_out_leaves_no_trace(plans):
    """A long request that is taken out at any time leaves no trace."""
    batch, ranks = long_batch(max_tokens=300), PlayedRanks(2, delay=1, long_delay=2)
    long = batch.add("long", 0, toy_request(steps=2, image_tokens=LONG))
    batch.add("other", 0, toy_request("b", None, steps=9))
    for _ in range(plans):
        turn(batch, ranks)
    batch.take_out(long)
    assert turn(batch, ranks).plan.retire == ([long.id] if plans else [])
    for _ in range(15):
        planned = turn(batch, ranks)
        assert not planned.plan.long_steps
        assert not planned.plan.forwards
    assert not len(batch)
    assert not batch.awaits_side_work
    assert batch.next_plan().plan.is_empty()


def test_a_failed_long_forward_is_waited_for_no_more():
    """A long forward that fails on one rank is waited for no more."""
    batch, ranks = long_batch(max_tokens=300), PlayedRanks(2, long_delay=10**6)
    long = batch.add("long", 0, toy_request(steps=2, image_tokens=LONG))
    for _ in range(3):
        run_plan(batch, ranks)
    assert batch.note_side_report(SideReport(long.id, FORWARDED, 1, 0.0, "no luck")) is long
    batch.take_out(long)
    assert batch.next_plan().plan.retire == [long.id]
    assert not batch.awaits_side_work
    assert batch.note_side_report(SideReport(long.id, FORWARDED, 0, 1.0)) is None


def test_a_paused_long_request_goes_on_where_it_was():
    batch, ranks = long_batch(max_tokens=300), PlayedRanks(2, long_delay=1)
    batch.add("long", 0, toy_request(steps=2, image_tokens=LONG))
    for _ in range(3):
        run_plan(batch, ranks)
    for _ in range(3):
        planned = batch.next_plan(admit=False, step=False)
        assert planned.plan.is_empty()
        for report, _ in ranks.run(planned.plan).side:
            batch.note_side_report(report)
    assert not batch.awaits_side_work
    assert batch.next_plan().plan.long_steps == [0]


def test_a_step_is_bounded_in_time_as_in_tokens():
    cost = msgspec.structs.replace(UNCALIBRATED, step_us=100, square_us=1)
    batch = StepBatch(1, 8, 10**6, cost, max_step_us=100 + 2 * cost.forward(30))
    for name in "abc":
        batch.add(name, 0, toy_request("12345", None, steps=1, image_tokens=25))
    assert [len(batch.next_plan().admitted) for _ in range(2)] == [2, 0]


def test_the_shortest_goes_first_within_bounds():
    """The shortest goes first and nobody is overtaken for ever."""
    batch, ranks = StepBatch(1, 1, 10**6, UNCALIBRATED), PlayedRanks(1)
    lengths = [9, *range(1, 7), 7, *[2] * 20]
    arrivals = [(0, toy_request("x", None, steps=steps)) for steps in lengths]
    admitted, _ = play(batch, ranks, arrivals)
    half = MAX_OVERTAKEN // 2
    assert [lengths[id] for id in admitted[:half]] == [1, *[2] * (half - 1)]
    assert admitted[half] == 0, "it would be passed by more only while it does not fit"


def test_a_kept_long_request_goes_on_from_there():
    """A long request that was kept goes on from there when ranks start anew."""
    batch, ranks = long_batch(max_tokens=300), PlayedRanks(2)
    long = batch.add("long", 0, toy_request(steps=5, image_tokens=LONG, interval=(0.0, 0.6)))
    while ranks.steps[long.id] < 3:
        turn(batch, ranks)
    long.kept_steps, long.kept = 2, b"latents"
    assert batch.start_over(has_killed=False) == []
    ranks = PlayedRanks(2)
    ranks.steps[long.id] = 2
    assert forwards_of(batch, ranks) == {long.id: [(0, 1), (0,), (0,)]}
    assert long.done_steps == 5
