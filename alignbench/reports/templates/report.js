for (const point of document.querySelectorAll(".point")) {
  const show = () => {
    const template = document.getElementById(point.dataset.card);
    point.closest(".tradeoff").querySelector(".card").replaceChildren(template.content.cloneNode(true));
  };
  for (const event of ["mouseenter", "focus", "click"]) point.addEventListener(event, show);
}
for (const table of document.querySelectorAll(".sortable")) {
  const heads = [...table.querySelectorAll("th")];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "nan" || y === "nan") return (x === "nan") - (y === "nan");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return up ? order : -order;
    });
    table.tBodies[0].append(...rows);
  }));
}
const large = document.querySelector("dialog.large");
for (const image of document.querySelectorAll("img.enlarge")) {
  const open = () => {
    large.querySelector("img").src = image.src;
    large.classList.toggle("figure", image.closest("figure") !== null);
    large.querySelector("p").textContent = image.alt;
    large.showModal();
  };
  image.addEventListener("click", open);
  image.addEventListener("keydown", event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(); } });
}
large.addEventListener("click", event => { if (event.target.tagName !== "P") large.close(); });
