// The theme's buttons that open a part of the navigation have no name for those who do not see them.
document.addEventListener("DOMContentLoaded", () => {
  for (const summary of document.querySelectorAll("li.has-children > details > summary")) {
    const page = summary.closest("li").querySelector("a");
    summary.setAttribute("aria-label", `Pages of ${page.textContent.trim()}`);
  }
});
