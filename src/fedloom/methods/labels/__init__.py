"""What if labels are few, or wrong?"""
