"""Each rule of the protocol switched off once: the exploration notices, by a walk found by search or by a story."""

import protocol_mutants
import pytest
from protocol_stories import STORIES

from elaswave.core.protocol.worker import StepProtocol
from elaswave.sim.explore import walk
from elaswave.sim.scenes import WALKS
from elaswave.sim.shell import Violation
from elaswave.sim.stories import play
from elaswave.sim.world import World

NOTICED = (
    ("OneLedgerPerWorker", "2x2, capped log", 4),
    ("AnySumsWillDo", "2x2, late reports", 0),
    ("EarlyEdgesAreDropped", "2x2, suspicions", 2),
    ("EarlySumsAreDropped", "2x2, suspicions", 0),
    ("LogsAreNotSentAgain", "2x2", 0),
    ("EvictedIsGone", "2x2, capped log", 2),
    ("SumsAreSentOnce", "2x2, late reports", 1),
    ("AnyVersionWillDo", "2x2", 0),
    ("FactsAreOfMyStep", "2x2, capped log", 0),
    ("ParametersWithoutDecision", "2x2, late reports", 7),
    ("AdoptionStartsOver", "2x2", 0),
    ("OwnersDecide", "pp3", 15),
    ("LossOfTheWorker", "2x2, late reports", 0),
    ("LeapsAreNotTold", "2x2, swaps", 46),
    ("GapsAreSkipped", "2x2, cuts", 11),
    ("GapsAreNotFilled", "pp3", 0),
    ("NewOwnersKeepQuiet", "2x2", 1),
    ("NewHostsGetNothing", "stages of two layers", 1),
    ("LogsGoEarly", "everything", 0),
    ("CopiesAreDroppedAlways", "2x2, cuts", 5),
    ("RefusedIsForgotten", "r=0, cuts", 82),
    ("NewcomersAreNotTold", "2x2, suspicions", 0),
    ("CopiesAskOnce", "everything", 0),
    ("GatesAreNotTold", "2x2, swaps", 3),
    ("GatesDoNotTell", "2x2, suspicions", 16),
    ("BrokenLinksAreIgnored", "2x2, capped log", 2),
    ("OnlyOldCopiesAskAgain", "2x2, capped log", 42),
    ("LeavingByOwnView", "pp3", 0),
)
"""(mutant, scene, seed): with the rule broken, this walk violates a promise."""

BY_STORY = (
    ("EarlyReducedAreDropped", "one behind", "fall back"),
    ("OnlyComputedIsForwarded", "swapped while reducing", "waits for ever"),
    ("ReducedIsNotSentAgain", "two copies, one gradient", "fall back"),
    ("AnyVersionCounts", "a vote of a lagging copy", "fall back"),
    ("DecisionsAreNotPassedOn", "told by one who learned", "waits for ever"),
    ("OwnersAnswerLater", "one behind", "fall back"),
    ("DecidedIsDropped", "one behind", "fall back"),
    ("SuspectsDecide", "decided without the new copy", "waits for ever"),
    ("NewcomersGetNoSums", "a sum lost on the way", "waits for ever"),
    ("HostsNeverAsk", "let in too early", "waits for ever"),
)
"""(mutant, story, how it ends): walks do not find these. A run may fall back to a checkpoint only where no copy can be
proven complete; in these stories one can, with the rule."""

COVERED = (("NoAnswerToLatecomers", "DecisionsAreNotPassedOn", "told by an answer", "waits for ever"),)
"""(mutant, another one, story, how it ends): the story ends well with either of them, not with both."""


@pytest.mark.parametrize(("name", "scene", "seed"), NOTICED)
def test_a_broken_rule_is_noticed(name: str, scene: str, seed: int) -> None:
    mutant = getattr(protocol_mutants, name)
    with pytest.raises(Violation):
        if issubclass(mutant, World):
            walk(WALKS[scene], seed, kind=mutant)
        else:
            walk(WALKS[scene], seed, protocol=mutant)


def test_the_same_walks_are_good_with_all_rules() -> None:
    for _, scene, seed in NOTICED:
        walk(WALKS[scene], seed)


@pytest.mark.parametrize(("name", "story", "end"), BY_STORY)
def test_a_broken_rule_spoils_a_story(name: str, story: str, end: str) -> None:
    with pytest.raises(Violation, match=end):
        play(STORIES[story], getattr(protocol_mutants, name))


@pytest.mark.parametrize("name", STORIES)
def test_every_story_ends_well_with_all_rules(name: str) -> None:
    play(STORIES[name])


@pytest.mark.parametrize(("name", "other", "story", "end"), COVERED)
def test_of_two_rules_that_cover_for_each_other_one_is_enough(name: str, other: str, story: str, end: str) -> None:
    one, two = getattr(protocol_mutants, name), getattr(protocol_mutants, other)
    play(STORIES[story], one)
    play(STORIES[story], two)
    with pytest.raises(Violation, match=end):
        play(STORIES[story], type("Both", (one, two), {}))


def test_hosts_need_not_ask_where_the_controller_waits_for_those_it_lets_in() -> None:
    play(STORIES["let in when it has dropped"], protocol_mutants.HostsNeverAsk)


def test_every_mutant_is_judged() -> None:
    mutants = {
        name
        for name, found in vars(protocol_mutants).items()
        if isinstance(found, type) and issubclass(found, StepProtocol | World) and found not in (StepProtocol, World)
    }
    assert mutants == {name for name, *_ in (*NOTICED, *BY_STORY, *COVERED)}
