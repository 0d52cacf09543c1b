"""What if the data of different clients come from different domains?"""
