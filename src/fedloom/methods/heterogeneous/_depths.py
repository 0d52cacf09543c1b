"""Clients with networks of several depths, each the first part of the next: `node.nets`, the shallowest first."""

from fedloom.cohort import Each
from fedloom.errors import UsageError


def levels(method, given, whole, what):
    """The depths that there are, in their order: the given ones, or all up to the whole network's."""
    if given and (min(given) < 1 or max(given) != whole):
        raise UsageError(
            f"{method.name()}.{what} are {given}; each must be at least 1, and the largest {whole}, what the whole "
            "network has: else nobody would train the rest"
        )
    return sorted(set(given)) or range(1, whole + 1)


def network_of(node, k, given, name):
    """The name of client k's network: dealt in turn, as given or else one after the other."""
    dealt = [name(level) for level in given] or list(node.nets)
    return dealt[k % len(dealt)]


def parts(server, clients, network_of):
    """Of the server's model, what each client's network has."""
    models = {name: part(server, name) for name in server.nets}
    return Each({k: models[network_of(server, k)] for k in clients})


def part(server, name):
    """Of the server's model, what the network of that name has."""
    return server.model.select(*server.nets[name])


def pieces(client, own, v):
    """A vector of a client's own network as what each depth has beyond those before it."""
    names, found, held = list(client.nets), {}, ()
    for name in names[: names.index(own) + 1]:
        entries = client.nets[name].layout.names
        found[name] = v.select(*(entry for entry in entries if entry not in held))
        held = entries
    return found


def judged(server):
    """The whole network, and by name that of every depth."""
    return {name: part(server, name) for name in reversed(server.nets)} if len(server.nets) > 1 else server.model
