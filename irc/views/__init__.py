"""Views for people: a model's units and graphs as data, the routes of a text, HTML pages and plots."""
