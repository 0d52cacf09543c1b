"""Which clients should learn together?"""
