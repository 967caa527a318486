"""How many NVLink domains and ranks a token is sent to: exact expectations, from where experts and groups lie.

Routing keeps a token to `chosen` of the expert groups (R§2.1.2) and takes `topk / chosen` experts of each, drawn
without replacement: even load. Experts lie in order over the ranks of the expert-parallel group, ranks in order over
the NVLink domains; a domain need not divide the group (EP128 on NVL72 lies in two domains, 72 and 56 ranks).
"""

from functools import lru_cache
from math import comb
from typing import NamedTuple

from dsv3_megatron.plan.job import Job


class Destinations(NamedTuple):
    """Expected numbers for one token, mean over the ranks that it may start from.

    Attributes:
        domains: other NVLink domains that hold at least one of its experts.
        ranks: other ranks, in its own and in other domains, that do.
        experts_outside: experts in other domains, counted with repetition: copies of an all-to-all that sends one for
            each expert.
        experts_inside: experts on other ranks of its own domain.
        num_domains: over which the experts of one layer are spread.
    """

    domains: float
    ranks: float
    experts_outside: float
    experts_inside: float
    num_domains: int


def destinations(job: Job, domain: int) -> Destinations:
    """Of a job on NVLink domains of `domain` GPUs; neighbours that share an expert count as one rank."""
    s, domain = job.sizes, max(1, domain // job.layout.etp)
    return _expected(
        s.num_moe_experts,
        job.layout.ep,
        domain,
        job.moe_router_num_groups,
        job.moe_router_group_topk,
        s.moe_router_topk,
    )


def most_imbalance(ranks: int, experts_per_rank: float, topk: int) -> float:
    """Tokens of the fullest rank over the mean, at most: all send as many of their copies as they can to one rank."""
    return ranks * min(topk, experts_per_rank) / topk


@lru_cache(maxsize=4096)
def _expected(experts: int, ep: int, domain: int, groups: int, chosen: int, topk: int) -> Destinations:
    domain_of_rank = [rank // domain for rank in range(ep)]
    rank_of_expert = [expert * ep // experts for expert in range(experts)]
    group_of_expert = [expert * groups // experts for expert in range(experts)]
    per_group = topk / chosen

    def hit(places: list[int], num_places: int) -> list[float]:
        """Probability of each place that it holds one of the token's experts."""
        held = [[0] * groups for _ in range(num_places)]
        for place, group in zip(places, group_of_expert, strict=True):
            held[place][group] += 1
        sizes = [sum(column) for column in zip(*held, strict=True)]
        known: dict[tuple[int, ...], float] = {}
        for row in map(tuple, held):
            if row not in known:
                missed = [_missed(size, n, per_group) for size, n in zip(sizes, row, strict=True)]
                known[row] = 1 - _mean_product(missed, chosen)
        return [known[tuple(row)] for row in held]

    num_domains = domain_of_rank[-1] + 1
    of_domain = hit([domain_of_rank[rank] for rank in rank_of_expert], num_domains)
    of_rank = hit(rank_of_expert, ep)
    # A token starts on any rank with the same probability; what lies on its own rank or domain is not sent.
    share = [domain_of_rank.count(d) / ep for d in range(num_domains)]
    own = sum(p * q for p, q in zip(of_domain, share, strict=True))
    inside = sum(q * q for q in share)  # experts lie evenly over the ranks
    return Destinations(
        sum(of_domain) - own if num_domains > 1 else 0.0,
        sum(of_rank) * (ep - 1) / ep,
        topk * (1 - inside),
        topk * (inside - 1 / ep),
        num_domains,
    )


def _missed(size: int, held: int, drawn: float) -> float:
    """Probability that none of `drawn` of `size` experts is one of `held`; between whole numbers, linear."""
    low = int(drawn)
    exact = [comb(size - held, n) / comb(size, n) if n <= size else 0.0 for n in (low, low + 1)]
    return exact[0] + (drawn - low) * (exact[1] - exact[0])


def _mean_product(values: list[float], chosen: int) -> float:
    """Mean, over all choices of `chosen` of the values, of their product."""
    sums = [1.0] + [0.0] * chosen  # elementary symmetric polynomials
    for value in values:
        for n in range(chosen, 0, -1):
            sums[n] += sums[n - 1] * value
    return sums[chosen] / comb(len(values), chosen)
