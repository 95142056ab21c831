"""Who is answered when: requests, a scheduler that takes them in turn, and one owner at a time of model and pages."""
