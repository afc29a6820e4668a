import java.io.FileNotFoundException;
import java.io.FilterOutputStream;
import java.io.IOException;
import java.io.OutputStream;
import java.net.URI;
import java.net.URLDecoder;
import java.net.URLEncoder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.NoSuchFileException;
import java.nio.file.StandardCopyOption;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.UUID;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.FSDataInputStream;
import org.apache.hadoop.fs.FSDataOutputStream;
import org.apache.hadoop.fs.FileAlreadyExistsException;
import org.apache.hadoop.fs.FileStatus;
import org.apache.hadoop.fs.FileSystem;
import org.apache.hadoop.fs.Path;
import org.apache.hadoop.fs.permission.FsPermission;
import org.apache.hadoop.util.Progressable;

/**
 * store://BUCKET/KEY: an object store as Hadoop's clients of such stores show it, for tests.
 *
 * Objects are flat: names without folders, which are prefixes of keys or empty objects whose key ends in a slash. An
 * object appears when its writer closes it, whole. There is no rename: each object is copied, one after another, then
 * each old one is deleted, so that whoever dies or looks in between sees some of both. Objects are files in the folder
 * of fs.store.root, their keys quoted.
 */
public class ObjectStore extends FileSystem {
  private URI uri;
  private java.nio.file.Path root;
  private Path work = new Path("/");

  @Override
  public String getScheme() {
    return "store";
  }

  @Override
  public void initialize(URI name, Configuration conf) throws IOException {
    super.initialize(name, conf);
    setConf(conf);
    uri = URI.create(name.getScheme() + "://" + name.getAuthority());
    root = java.nio.file.Path.of(conf.get("fs.store.root"), name.getAuthority());
    Files.createDirectories(root);
  }

  @Override
  public URI getUri() {
    return uri;
  }

  private String key(Path path) {
    String key = makeQualified(path).toUri().getPath();
    return key.isEmpty() ? key : key.substring(1); // a bucket may be written without the slash behind it
  }

  private java.nio.file.Path object(String key) {
    return root.resolve("o-" + URLEncoder.encode(key, StandardCharsets.UTF_8));
  }

  /** Keys that begin with a prefix, in order, with their objects. */
  private Map<String, java.nio.file.Path> below(String prefix) throws IOException {
    Map<String, java.nio.file.Path> found = new TreeMap<>();
    try (var files = Files.newDirectoryStream(root, "o-*")) {
      for (java.nio.file.Path file : files) {
        String key = URLDecoder.decode(file.getFileName().toString().substring(2), StandardCharsets.UTF_8);
        if (key.startsWith(prefix)) {
          found.put(key, file);
        }
      }
    }
    return found;
  }

  private static String prefix(String key) {
    return key.isEmpty() ? "" : key + "/";
  }

  private FileStatus folder(Path path) {
    return new FileStatus(0, true, 1, 1, 0, makeQualified(path));
  }

  private FileStatus file(Path path, java.nio.file.Path object) throws IOException {
    try {
      long time = Files.getLastModifiedTime(object).toMillis();
      return new FileStatus(Files.size(object), false, 1, 32 << 20, time, makeQualified(path));
    } catch (NoSuchFileException gone) {
      throw new FileNotFoundException(path.toString());
    }
  }

  @Override
  public FileStatus getFileStatus(Path path) throws IOException {
    String key = key(path);
    if (!key.isEmpty() && Files.exists(object(key))) {
      return file(path, object(key));
    }
    if (key.isEmpty() || !below(prefix(key)).isEmpty()) {
      return folder(path);
    }
    throw new FileNotFoundException(path.toString());
  }

  @Override
  public FileStatus[] listStatus(Path path) throws IOException {
    FileStatus status = getFileStatus(path);
    if (status.isFile()) {
      return new FileStatus[] {status};
    }
    String prefix = prefix(key(path));
    Map<String, FileStatus> found = new TreeMap<>();
    for (var entry : below(prefix).entrySet()) {
      String rest = entry.getKey().substring(prefix.length());
      int slash = rest.indexOf('/');
      String name = slash < 0 ? rest : rest.substring(0, slash);
      if (!name.isEmpty()) {
        Path child = new Path(makeQualified(path), name);
        found.put(name, slash < 0 ? file(child, entry.getValue()) : folder(child));
      }
    }
    return found.values().toArray(new FileStatus[0]);
  }

  @Override
  public FSDataInputStream open(Path path, int bufferSize) throws IOException {
    if (getFileStatus(path).isDirectory()) {
      throw new FileNotFoundException(path + " is a folder");
    }
    return FileSystem.getLocal(getConf()).getRaw().open(new Path(object(key(path)).toString()), bufferSize);
  }

  @Override
  public FSDataOutputStream create(
      Path path, FsPermission permission, boolean overwrite, int bufferSize, short replication, long blockSize,
      Progressable progress) throws IOException {
    String key = key(path);
    if (!overwrite && Files.exists(object(key))) {
      throw new FileAlreadyExistsException(path.toString());
    }
    java.nio.file.Path upload = root.resolve("upload-" + UUID.randomUUID());
    OutputStream bytes = new FilterOutputStream(Files.newOutputStream(upload)) {
      private boolean closed;

      @Override
      public void write(byte[] data, int start, int length) throws IOException {
        out.write(data, start, length);
      }

      @Override
      public void close() throws IOException {
        if (!closed) {
          closed = true;
          super.close();
          Files.move(upload, object(key), StandardCopyOption.ATOMIC_MOVE);
        }
      }
    };
    return new FSDataOutputStream(bytes, statistics);
  }

  @Override
  public FSDataOutputStream append(Path path, int bufferSize, Progressable progress) {
    throw new UnsupportedOperationException("objects are written once");
  }

  @Override
  public boolean rename(Path from, Path to) throws IOException {
    FileStatus status = getFileStatus(from);
    String target = key(to);
    if (!target.isEmpty() && below(prefix(target)).size() > 0) {
      target = prefix(target) + from.getName();
    }
    Map<String, java.nio.file.Path> objects =
        status.isFile() ? Map.of(key(from), object(key(from))) : below(prefix(key(from)));
    if (Files.exists(object(target))) {
      return false;
    }
    for (var entry : objects.entrySet()) {
      String moved = target + entry.getKey().substring(key(from).length());
      java.nio.file.Path copy = root.resolve("upload-" + UUID.randomUUID());
      Files.copy(entry.getValue(), copy);
      Files.move(copy, object(moved), StandardCopyOption.ATOMIC_MOVE);
    }
    for (java.nio.file.Path object : objects.values()) {
      Files.deleteIfExists(object);
    }
    return true;
  }

  @Override
  public boolean delete(Path path, boolean recursive) throws IOException {
    String key = key(path);
    if (!key.isEmpty() && Files.deleteIfExists(object(key))) {
      return true;
    }
    List<java.nio.file.Path> objects = new ArrayList<>(below(prefix(key)).values());
    boolean onlyItself = objects.size() == 1 && objects.get(0).equals(object(prefix(key)));
    if (!recursive && !objects.isEmpty() && !onlyItself) {
      throw new IOException(path + " is not empty");
    }
    for (java.nio.file.Path object : objects) {
      Files.deleteIfExists(object);
    }
    return !objects.isEmpty();
  }

  @Override
  public boolean mkdirs(Path path, FsPermission permission) throws IOException {
    for (Path above = path; above != null && !key(above).isEmpty(); above = above.getParent()) {
      if (Files.exists(object(key(above)))) {
        throw new FileAlreadyExistsException(above + " is an object");
      }
    }
    String key = prefix(key(path));
    if (!key.isEmpty() && below(key).isEmpty()) {
      Files.write(object(key), new byte[0]);
    }
    return true;
  }

  @Override
  public void setWorkingDirectory(Path path) {
    work = path;
  }

  @Override
  public Path getWorkingDirectory() {
    return work.makeQualified(uri, new Path("/"));
  }
}
