"""The report of a run: one HTML file with tables and pictures, and a model card in Markdown."""
