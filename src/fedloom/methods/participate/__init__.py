"""Who should take part, and what if some come more often than others?"""
