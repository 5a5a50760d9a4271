// The theme's buttons that open a part of the navigation have no name for those who do not see them.
document.addEventListener("DOMContentLoaded", () => {
  for (const summary of document.querySelectorAll("li.has-children > details > summary")) {
    const page = summary.closest("li").querySelector("a");
    summary.setAttribute("aria-label", `Pages of ${page.textContent.trim()}`);
  }
});
// The theme keeps how far its navigation was scrolled, also for another section, whose beginning is then hidden.
window.addEventListener("load", () => {
  const navigation = document.querySelector(".bd-sidebar-primary");
  if (navigation && !navigation.querySelector(".bd-links li.current")) navigation.scrollTop = 0;
});
