"""Stories in which one rule of the protocol matters; see elaswave/sim/stories.py for their lines."""

from dataclasses import replace

from elaswave.sim.scene import Scene
from elaswave.sim.stories import Story

_TWO_STAGES = Scene(
    workers=4, hosts=((0, 1), (2, 3)), copies=(((0,), 0, (1,)), ((0,), 2, ()), ((1,), 2, (3,))), replicas=0
)
_ONE_SHARD = Scene(workers=3, hosts=((0, 1, 2),), copies=(((0,), 0, ()),), replicas=0)

_TOLD_BY_ONE_WHO_LEARNED = """
    swap 0 3
    run but hop0 hop1 hop2 hop3 copies      # w3 fetches a copy of shard 0
    copies                                  # and begins to gate, in the view of w0 and w1
    adopt 0
    adopt 1
    run but 0>3:Reduced adopt2 adopt3       # w2 decides in its old view; w1 learns that by parameters
    crash 0
    lose 0 3                                # w3 has no gradient, and w1 has applied it
"""

STORIES = {
    "one behind": Story(
        tells="A copy that is fetched while its step is decided gets state and gradient before their owner dies.",
        scene=Scene(workers=3, hosts=((0, 1, 2),), copies=(((0,), 0, ()), ((0,), 2, ())), replicas=0, micro_batches=3),
        lines="""
            swap 0 1
            run but adopt1 2>0
            2>0 Partial                     # w0 reduces shard 0, but lacks the "have" of w2
            run but adopt1 2>0              # w1 gets the gradient, and decides
            adopt 1
            1>0 StateRequest
            run but 2>0 0>1:Reduced         # w0 answers at the version before
            crash 0
            lose 0 1
        """,
    ),
    "swapped while reducing": Story(
        tells="The old owner reduces, tells the new one and dies: the new one has to tell the replica.",
        scene=Scene(workers=3, hosts=((0, 1, 2),), copies=(((0,), 0, (1,)),), micro_batches=3),
        lines="""
            swap 0 2
            run but hop0 hop1 hop2 copies   # w2 fetches a copy
            copies
            run but hop0 hop1 hop2 copies   # and gates
            copies                          # and is the owner
            run but adopt0 adopt1 adopt2 1>0
            adopt 2
            1>0 Partial                     # w0 reduces, as owner in its view
            0>2 Reduced
            crash 0
            lose 0 1
        """,
    ),
    "two copies, one gradient": Story(
        tells="Owner and then the only copy with the gradient die: it had passed it on when the owner was lost.",
        scene=Scene(
            workers=4, hosts=((0, 1, 2, 3),), copies=(((0,), 0, ()), ((0,), 3, ())), replicas=0, micro_batches=1
        ),
        lines="""
            swap 0 1
            swap 0 2
            run but hop0 copies             # w1 and w2 fetch copies of shard 0
            run but copies 0>2:Reduced 3>0 3>1 3>2      # w3 decides; w1 has the gradient, w2 has not
            crash 0
            lose 0 2
            run but facts 3>1 3>2           # all have adopted the plan without owner
            crash 1
        """,
    ),
    "a vote of a lagging copy": Story(
        tells="A gating copy with the gradient of the step, but not its version, keeps it from being decided.",
        scene=Scene(workers=2, hosts=((0, 1),), copies=(((0,), 0, ()),), replicas=0, steps=2, micro_batches=1),
        lines="""
            swap 0 1
            adopt 1
            1>0 StateRequest
            0>1 State                       # w1 has version 0
            run but adopt0 hop0             # and gates, in its own view
            run but adopt0 1>0:StateRequest until w0 at 1   # step 0 is decided without it
            run but 1>0:StateRequest        # it has the gradient of step 1, but not that of step 0
            1>0 StateRequest
            run but copies last 0>1 until w0 at 2
            crash 0
            lose 0 1
        """,
    ),
    "told by one who learned": Story(
        tells="Who gates in the newest view only is told a decision by those who learned it, not by those who made it.",
        scene=_TWO_STAGES,
        lines=_TOLD_BY_ONE_WHO_LEARNED,
    ),
    "told by an answer": Story(
        tells="The same, but the one who has to be told has logged a gradient for the lost worker and sends it again.",
        scene=replace(_TWO_STAGES, hosts=((0, 1), (3, 2))),
        lines=_TOLD_BY_ONE_WHO_LEARNED,
    ),
    "decided without the new copy": Story(
        tells="A suspect decides in an old view, where the copy that is now the owner did not count.",
        scene=Scene(
            workers=4, hosts=((0, 1, 2, 3),), copies=(((0,), 0, ()), ((0,), 1, (3,))), replicas=0, micro_batches=1
        ),
        lines="""
            swap 0 2
            run but adopt1 hop0 copies      # w2 fetches a copy of shard 0
            copies
            run but adopt1 hop0 copies      # and gates, in the view of all but w1
            run but adopt1 copies 0>2:Reduced 1>0 1>2   # w1 decides
            suspect 1
            run but adopt1 0>2:Reduced 1>0 1>2          # w2 is confirmed, and the owner
            crash 0
            lose 0 2                        # w2 has no gradient: it needs the sums of all others
            1>2 Parameters
        """,
    ),
    "a sum lost on the way": Story(
        tells="A sum for a suspect is lost with its link while the sender does not count on it; then it owns again.",
        scene=Scene(workers=2, hosts=((0, 1),), copies=(((0,), 1, ()),), replicas=0),
        lines="""
            run but 0>1 1>0
            cut 0 1
            suspect 1
            adopt 0
        """,
    ),
    "let in too early": Story(
        tells="A suspect is let in before it has adopted its exclusion, and drops then what was published to it.",
        scene=_ONE_SHARD,
        lines="""
            suspect 1
            admit 1                         # the controller would wait
            run but adopt1
        """,
    ),
    "let in when it has dropped": Story(
        tells="The same, with a controller that waits.",
        scene=_ONE_SHARD,
        lines="""
            suspect 1
            run but adopt1
        """,
    ),
}
