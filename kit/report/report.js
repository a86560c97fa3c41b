// Tables are sorted by the heading that is clicked, or entered from the keyboard.
for (const head of document.querySelectorAll("thead th")) {
  const at = head.cellIndex, table = head.closest("table"), body = table.tBodies[0];
  const key = row => {
    const text = row.cells[at].textContent.trim();
    const number = /^[+<-]?\s*[\d.,]+(?=[\s%x\[]|$)/.exec(text);
    return number ? parseFloat(number[0].replace(/[,<+\s]/g, "")) : text;
  };
  const compare = (a, b) =>
    typeof a !== typeof b ? (typeof a === "number" ? -1 : 1) : a < b ? -1 : a > b ? 1 : 0;
  const sort = () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...body.rows].map(row => [key(row), row]);
    rows.sort((a, b) => sign * compare(a[0], b[0]));
    body.append(...rows.map(pair => pair[1]));
  };
  head.tabIndex = 0;
  head.addEventListener("click", sort);
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
}
