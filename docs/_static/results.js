// Below each result of a search: what its page is about, from leads.js, which is loaded like a file.
document.addEventListener("DOMContentLoaded", () => {
  const results = document.querySelector("#search-results");
  if (!results) return;
  const root = new URL(document.documentElement.dataset.content_root, location.href).href;
  const explain = () => {
    for (const link of results.querySelectorAll("ul.search > li > a:not(.explained)")) {
      link.classList.add("explained");
      const page = link.href.split(/[?#]/)[0].slice(root.length).replace(/\.html$/, "");
      const lead = document.createElement("p");
      lead.textContent = LEADS[page] ?? "";
      if (lead.textContent) link.closest("li").append(lead);
    }
  };
  const leads = document.createElement("script");
  leads.src = `${root}_static/leads.js`;
  leads.addEventListener("load", () => {
    new MutationObserver(explain).observe(results, { childList: true, subtree: true });
    explain();
  });
  document.head.append(leads);
});
