"""What passes between the server and the clients, and what may happen to it on the way."""

from fedloom.boundary.boundary import Boundary

__all__ = ["Boundary"]
