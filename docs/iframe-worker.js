// Browsers start no worker for a page that is opened from disk: there an iframe does the work of the search.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inner = frame.contentWindow;
      this.loaded = new Promise((resolve) => { frame.onload = resolve; });
      const answer = "postMessage = (data) => parent.dispatchEvent(new MessageEvent('message', {data, source: window}))";
      const page = `<script>${answer}<\/script><script src="${url}"><\/script>`;
      this.inner.document.open();
      this.inner.document.write(page);
      this.inner.document.close();
      addEventListener("message", ({source, data}) => {
        if (source === this.inner) this.dispatchEvent(new MessageEvent("message", {data}));
      });
    }
    postMessage(data) {
      this.loaded.then(() => this.inner.dispatchEvent(new MessageEvent("message", {data})));
    }
  };
}
