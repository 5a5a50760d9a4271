// Whole names first, then titles of pages; a part of a name, such as an attribute, comes behind them.
var Scorer = {
  score: ([docname, title, anchor, descr, score, filename, kind]) =>
    score + (docname.startsWith("docs/guides/") ? 6 : docname.startsWith("docs/reference/") ? 0 : 3),
  objNameMatch: 25,
  objPartialMatch: 4,
  objPrio: { 0: 8, 1: 2, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
