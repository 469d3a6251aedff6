"""Policy-gradient fine-tuning of the supervised recommender, and the judgement whether it is used."""
