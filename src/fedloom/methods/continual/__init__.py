"""How is the past kept while new tasks come?"""
