"""Training between machines that know each other by certificates: `pip install "fedloom[net]"`."""
