"""How do clients with different data pull in one direction?"""
