"""The published description of EPLB in plain Python, one layer at a time: what `eplb.py` is compared with."""

import numpy

Layer = tuple[list[int], list[list[int]], list[int]]


def rebalance(weight: list[float], replicas: int, groups: int, nodes: int, gpus: int) -> Layer:
    """phy2log, log2phy (without padding), logcnt of one layer."""
    if groups % nodes:
        groups = nodes = 1
    size = len(weight) // groups
    load = [numpy.float32(w) for w in weight]
    group_load = [_sum(load[g * size : (g + 1) * size]) for g in range(groups)]
    phy2log: list[int] = []
    copies: list[int] = []
    for members in _pack(list(range(groups)), group_load, nodes):
        experts = [g * size + i for g in members for i in range(size)]
        # Every expert once, then a copy of the one whose copies have most to do.
        slots = [(e, 0) for e in experts]
        count = dict.fromkeys(experts, 1)
        while len(slots) < replicas // nodes:
            busiest = max(experts, key=lambda e: load[e] / numpy.float32(count[e]))
            slots.append((busiest, count[busiest]))
            count[busiest] += 1
        per_slot = [load[e] / numpy.float32(count[e]) for e, _ in slots]
        for gpu in _pack(list(range(len(slots))), per_slot, gpus // nodes):
            phy2log += [slots[i][0] for i in gpu]
            copies += [slots[i][1] for i in gpu]
    log2phy: list[list[int]] = [[] for _ in weight]
    for slot in sorted(range(replicas), key=lambda slot: copies[slot]):
        log2phy[phy2log[slot]].append(slot)
    return phy2log, log2phy, [len(slots) for slots in log2phy]


def _pack(items: list[int], weight: list, num_packs: int) -> list[list[int]]:
    """The members of each pack in the order of their arrival."""
    room = len(items) // num_packs
    if room == 1:
        return [[item] for item in items]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    load = [numpy.float32(0)] * num_packs
    for item in sorted(items, key=lambda i: -weight[i]):  # sorted() is stable: ties to the first
        pack = min((p for p in range(num_packs) if len(packs[p]) < room), key=lambda p: load[p])
        packs[pack].append(item)
        load[pack] += weight[item]
    return packs


def _sum(values: list) -> numpy.float32:
    total = numpy.float32(0)
    for value in values:
        total += value
    return total
