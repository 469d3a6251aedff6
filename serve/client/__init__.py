"""Clients of the recommender service."""
