"""Must everybody run the same model?"""
