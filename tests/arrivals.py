"""Who ends when, from a queue in plain Python, and local training that is known exactly."""

import heapq


def by_hand(durations, rounds, k=1):
    """[(client, staleness), ...] of each round, where a server step takes the next `k` that end, who then begin anew.

    `durations` are the seconds of each client's work.
    """
    queue, idle, tickets, now, out = [], set(range(len(durations))), 0, 0.0, []
    for round in range(rounds):
        for client in sorted(idle):
            heapq.heappush(queue, (now + durations[client], tickets, client, round))
            tickets += 1
        ended = [heapq.heappop(queue) for _ in range(k)]
        now, idle = ended[-1][0], {entry[2] for entry in ended}
        out.append([(client, round - begun) for _, _, client, begun in ended])
    return out


def trained(task, client, w, lr, steps):
    """Where so many steps of a client of `Quadratics` lead from w, tensors [2]."""
    return w + task.shrinkage(client, lr, steps) @ (task.centers[client] - w)
