"""The report's parts: what runs say together, in tables, words, pictures and a page. `lab.report` puts them together."""
