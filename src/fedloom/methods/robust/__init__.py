"""What if some clients lie?"""
