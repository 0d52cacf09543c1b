"""How is a large pretrained model tuned together?"""
