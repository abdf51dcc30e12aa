"""What the browser gets beside the elements of the page: style sheet, and script for files that are dropped."""

STYLE = """
body { background: #f1f5f9; color: #0f172a; overflow: hidden; }
.nicegui-content { padding: 0; gap: 0; height: 100vh; }
.bar { height: 52px; background: white; border-bottom: 1px solid #e2e8f0; }
.body { height: calc(100vh - 52px); }
.side { background: white; height: 100%; overflow-y: auto; }
.drop .q-uploader__list, .drop .q-uploader__subtitle { display: none; }
.drop { border: 1.5px dashed #a5b4fc; border-radius: 10px; width: 100% !important; box-shadow: none; flex: none; }
.list { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; align-items: start; width: 100%; }
.drop .q-uploader__header { background: #eef2ff; color: #4338ca; }
.drop .q-uploader__title { font-size: 13px; font-weight: 500; }
.card { border-radius: 10px; overflow: hidden; border: 2px solid #e2e8f0; background: white; cursor: pointer; }
.card:hover { border-color: #a5b4fc; }
.card.on { border-color: #4f46e5; box-shadow: 0 0 0 3px #e0e7ff; }
.card.suspect { border-color: #dc2626; }
.card .ph { position: relative; background: #e2e8f0; }
.card .ph { aspect-ratio: 4 / 3; }
.card img { width: 100%; height: 100%; object-fit: contain; display: block; }
.card svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.card .cap { display: flex; gap: 6px; align-items: center; font-size: 11px; padding: 3px 7px; color: #475569; }
.card .cap span:first-child { flex: 1; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.badge { border-radius: 99px; padding: 0 7px; font-weight: 600; background: #e2e8f0; color: #334155; }
.badge { white-space: nowrap; font-size: 11px; }
.badge.new { background: #fef3c7; color: #92400e; } .badge.bad { background: #fee2e2; color: #b91c1c; }
.badge.ok { background: #dcfce7; color: #166534; }
.canvas line { vector-effect: non-scaling-stroke; }
.canvas { cursor: crosshair; user-select: none; border-radius: 8px; overflow: hidden; box-shadow: 0 1px 8px #0f172a26; }
.cls { border: 1.5px solid #e2e8f0; border-radius: 10px; padding: 8px 10px; width: 100%; gap: 2px; }
.cls.on { border-color: #4f46e5; background: #f8faff; }
.muted { color: #64748b; font-size: 12px; } .head { font-weight: 600; font-size: 14px; }
.dot { width: 12px; height: 12px; border-radius: 4px; flex: none; }
.both { position: relative; } .both img { width: 100%; display: block; border-radius: 8px; }
.both svg { position: absolute; inset: 0; width: 100%; height: 100%; }
"""
DROP = """
<script>
document.addEventListener("dragover", e => e.preventDefault());
document.addEventListener("drop", async e => {
  e.preventDefault();
  if (e.target.closest(".q-uploader")) return;
  const files = [];
  const walk = async entry => {
    if (entry instanceof File) files.push(entry);
    else if (entry.isFile) files.push(await new Promise((ok, no) => entry.file(ok, no)));
    else {
      const reader = entry.createReader();
      for (;;) {
        const part = await new Promise((ok, no) => reader.readEntries(ok, no));
        if (!part.length) break;
        for (const x of part) await walk(x);
      }
    }
  };
  await Promise.all([...e.dataTransfer.items].map(x => x.webkitGetAsEntry() || x.getAsFile()).filter(x => x).map(walk));
  window.addToStudio(files);
});
</script>
"""
