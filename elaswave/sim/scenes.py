"""The scenes that tests explore: each is the smallest in which some rule of the protocol can break."""

from dataclasses import replace

from elaswave.sim.scene import Scene

DP2 = Scene(workers=2, hosts=((0, 1),), copies=(((0,), 0, (1,)),))
"""Two workers, one layer, one shard."""

PP2 = Scene(workers=2, hosts=((0,), (1,)), copies=(((0,), 0, (1,)), ((1,), 1, (0,))))
"""Two stages of one worker each: a loss leaves a stage without hosts."""

RING = Scene(workers=3, hosts=((0, 1),), copies=(((0,), 2, (0,)),), reduce="ring")
"""Two hosts and an owner that hosts nothing: the second host adds to what the first one sent."""

_DP3 = Scene(
    workers=3,
    hosts=((0, 1, 2),),
    copies=(((0,), 0, (1,)), ((0,), 1, (2,))),
    micro_batches=3,
    steps=2,
    crashes=2,
    suspicions=1,
)
_TWO_BY_TWO = Scene(
    workers=4,
    hosts=((0, 1), (2, 3)),
    copies=(((0,), 0, (2,)), ((0,), 1, (3,)), ((1,), 2, (1,)), ((1,), 3, (0,))),
    micro_batches=3,
    steps=2,
    crashes=2,
)
_TWO_SHARDS = replace(_TWO_BY_TWO, copies=(((0,), 0, (2,)), ((1,), 2, (1,))), micro_batches=2, steps=3)

_RING = Scene(
    workers=4,
    hosts=((0, 1, 2, 3),),
    copies=(((0,), 0, (1,)), ((0,), 2, (3,))),
    micro_batches=4,
    steps=3,
    crashes=2,
    reduce="ring",
)

EXHAUSTIVE = {
    "dp2": DP2,
    "dp2, 2 steps": replace(DP2, steps=2),
    "pp2": PP2,
    "dp2, late reports": replace(DP2, late_reports=True),
    "dp2, cut": replace(DP2, cuts=1),
    "pp2, 2 steps": replace(PP2, steps=2),
    "pp2, cut": replace(PP2, crashes=0, cuts=1),
    "pp2, capped log": replace(PP2, log_cap=0),
    "dp2, ring": replace(DP2, steps=2, late_reports=True, reduce="ring"),
    "ring, crash": replace(RING, copies=(((0,), 2, ()),), replicas=0),
    "ring, cut": replace(RING, crashes=0, cuts=1),
    "ring of three": replace(RING, hosts=((0, 1, 2),), copies=(((0,), 2, ()),), micro_batches=3, replicas=0),
}
"""Small enough to visit every state within seconds."""

SUSPECT = replace(DP2, suspicions=1)
"""A crash and a suspicion that comes back: tens of thousands of states."""

WALKS = {
    "dp3": _DP3,
    "dp3, swaps": replace(_DP3, copies=(((0,), 0, (1,)),), steps=3, swaps=1),
    "dp3, r=2": replace(_DP3, copies=(((0,), 0, (1, 2)), ((0,), 2, (0, 1))), replicas=2, steps=2),
    "dp3, r=0": replace(_DP3, copies=(((0,), 0, ()), ((0,), 1, ())), replicas=0),
    "2x2": _TWO_BY_TWO,
    "2x2, suspicions": replace(_TWO_SHARDS, crashes=1, suspicions=2),
    "2x2, swaps": replace(_TWO_SHARDS, suspicions=1, swaps=1),
    "2x2, late reports": replace(_TWO_SHARDS, suspicions=1, swaps=1, late_reports=True),
    "2x2, cuts": replace(_TWO_SHARDS, crashes=1, suspicions=1, cuts=2),
    "2x2, capped log": replace(_TWO_SHARDS, suspicions=1, cuts=1, log_cap=0),
    "r=0, cuts": Scene(
        workers=3,
        hosts=((0, 1), (2,)),
        copies=(((0,), 0, ()), ((1,), 2, ())),
        steps=2,
        crashes=0,
        suspicions=2,
        cuts=2,
        replicas=0,
    ),
    "mixed hosts": Scene(
        workers=3,
        hosts=((0, 1), (2, 1)),
        copies=(((0,), 0, (2,)), ((1,), 2, (1,))),
        steps=2,
        crashes=2,
        suspicions=1,
        swaps=1,
    ),
    "pp3": Scene(
        workers=4,
        hosts=((0,), (1,), (2, 3)),
        copies=(((0,), 0, (1,)), ((1,), 1, (2,)), ((2,), 3, (0,))),
        steps=2,
        crashes=2,
        suspicions=1,
    ),
    "tied": Scene(
        workers=3,
        hosts=((0,), (1, 2)),
        copies=(((0,), 0, (1,)), ((1,), 1, (2,)), ((0, 1), 0, (2,))),
        steps=2,
        crashes=2,
        suspicions=1,
    ),
    "stages of two layers": Scene(
        workers=3,
        hosts=((0, 1), (0, 1), (2,), (2,)),
        stage_ends=(2, 4),
        copies=(((0,), 0, (2,)), ((1,), 1, (0,)), ((2,), 2, (1,)), ((3,), 2, (0,))),
        steps=2,
        crashes=2,
        suspicions=1,
    ),
    "spares": replace(_TWO_SHARDS, spares=2, crashes=2, steps=3),
    "spares, late reports": replace(_DP3, spares=1, steps=3, suspicions=1, late_reports=True),
    "ring": _RING,
    "ring, swaps": replace(_RING, copies=(((0,), 0, (1,)),), crashes=1, suspicions=1, swaps=2),
    "ring, late reports": replace(_RING, crashes=1, suspicions=2, late_reports=True),
    "ring, cuts": replace(_RING, crashes=1, suspicions=1, cuts=3),
    "ring, r=0": replace(_RING, copies=(((0,), 0, ()), ((0,), 2, ())), replicas=0, crashes=0, suspicions=2, cuts=1),
    "ring, owners elsewhere": Scene(
        workers=4,
        hosts=((0, 1, 2), (1, 2, 3)),
        copies=(((0,), 3, (0,)), ((1,), 0, (3,)), ((0, 1), 1, (2,))),
        micro_batches=3,
        steps=3,
        crashes=2,
        suspicions=1,
        late_reports=True,
        reduce="ring",
    ),
    "ring, spares": replace(_RING, spares=2, crashes=2, suspicions=1, log_cap=1, late_reports=True),
    "everything": replace(_TWO_SHARDS, log_cap=1, spares=1, suspicions=1, swaps=1, cuts=1, late_reports=True),
}
"""Explored by seeded random walks."""
