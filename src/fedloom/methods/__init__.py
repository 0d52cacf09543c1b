"""One file a method, in folders by the question it answers. The folder is the registry."""
