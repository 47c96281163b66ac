"""Whether scores predict what they should: references, retraining, reports."""
